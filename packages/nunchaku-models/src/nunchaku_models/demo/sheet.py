"""Contact sheets: pictures in a grid, for people to look at."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def draw_sheet(images: Sequence[Image.Image], captions: Sequence[str], columns: int = 8) -> Image.Image:
    """The pictures in a grid, each with its caption below."""
    width, height, margin = 144, 160, 8
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * width, i // columns * height
        sheet.paste(image, (x + margin, y + margin))
        pen.text((x + width / 2, y + 152), caption, fill="black", font=font, anchor="ms")
    return sheet
