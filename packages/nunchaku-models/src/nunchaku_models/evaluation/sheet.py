"""A contact sheet: one row per transformer, one column per prompt, for people to look at."""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

MAX_COLUMNS = 8
MAX_SIDE = 256
"""Pixels; larger pictures are shown smaller."""
MARGIN, GAP = 12, 6
LABEL_SIZE, SMALL_SIZE = 15, 12
LINE = 19
INK, FAINT = "#1a1a1a", "#6a6a6a"


def thumbnail(picture: Image.Image) -> Image.Image:
    """A copy of at most 256x256 pixels."""
    small = picture.convert("RGB")
    small.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return small


def comparison_sheet(
    captions: Sequence[str], rows: Mapping[str, Sequence[Image.Image]], notes: Mapping[str, str]
) -> Image.Image:
    """Pictures in a grid, labelled on the left and captioned above.

    Args:
        captions: one per column; long ones are cut.
        rows: label, its parts divided by "/" -> pictures, all of one size.
        notes: label -> what stands below it, such as "30.1 dB".
    """
    label_font, small_font = ImageFont.load_default(LABEL_SIZE), ImageFont.load_default(SMALL_SIZE)
    lines = {label: [*label.split("/"), notes.get(label, "")] for label in rows}
    width, height = next(iter(rows.values()))[0].size
    left = MARGIN + GAP + int(max(label_font.getlength(line) for texts in lines.values() for line in texts))
    top = MARGIN + SMALL_SIZE + GAP
    columns = min(len(captions), MAX_COLUMNS)
    row_height = max(height, 3 * LINE) + GAP
    size = (left + MARGIN + columns * (width + GAP), top + MARGIN + len(rows) * row_height)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions[:columns]):
        middle = left + GAP + column * (width + GAP) + width / 2
        pen.text((middle, top - GAP), _cut(caption, small_font, width), fill=INK, font=small_font, anchor="ms")
    for row, (label, pictures) in enumerate(rows.items()):
        y = top + row * row_height
        for column, picture in enumerate(pictures[:columns]):
            sheet.paste(picture, (left + GAP + column * (width + GAP), y))
        texts = [text for text in lines[label] if text]
        first = y + (row_height - GAP - len(texts) * LINE) / 2 + LINE / 2
        for number, text in enumerate(texts):
            ink = INK if number == 0 else FAINT
            pen.text((left - GAP, first + number * LINE), text, fill=ink, font=label_font, anchor="rm")
    return sheet


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """`text` on one line of this width in pixels."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[:200]).split())
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line.rstrip() + "..."
