# /// script
# requires-python = ">=3.11"
# dependencies = ["pillow", "resvg_py==0.5.0", "tqdm"]
# ///
"""Draw the training pictures: every icon of some npm packages as a 128x128 picture on white.

Needs ``npm`` on the path; nothing of the packages is run, their ``icons.json`` is only read.
The result is an image folder in the Hugging Face layout::

    data/metadata.jsonl                 one JSON object per picture: file_name, name, style, category
    data/noto/red-apple.webp            lossless
    data/fluent/red-apple.webp

Left out: hidden icons, the skin-tone variants of people (they are half of both sets and would
drown everything else) and icons drawn exactly like an earlier one of the same set.
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import resvg_py
from PIL import Image
from tqdm import tqdm

PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
}
"""Style word used in captions -> npm package, version pinned."""

PICTURE_SIZE = 128

SKIN_TONE = re.compile(r"-(medium-light|medium-dark|light|medium|dark)(-skin-tone)?(?=-|$)")


@dataclass(frozen=True)
class Icon:
    """One drawing of an icon set."""

    name: str
    category: str
    svg: str


def download_package(package: str) -> tuple[dict, dict]:
    """Fetch ``package`` with ``npm pack``; return its ``icons.json`` and ``metadata.json``."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True)
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as tar:
            icons, metadata = (
                json.load(tar.extractfile(f"package/{name}.json"))  # type: ignore[arg-type]
                for name in ("icons", "metadata")
            )
    return icons, metadata


def visible_icons(icons: dict, metadata: dict) -> Iterator[Icon]:
    """The icons worth learning, in the set's own order."""
    category_of = {name: category for category, names in metadata["categories"].items() for name in names}
    for name, icon in icons["icons"].items():
        category = category_of.get(name)
        if icon.get("hidden") or category is None:
            continue
        if category == "People & Body" and SKIN_TONE.search(name):
            continue
        width = icon.get("width", icons["width"])
        height = icon.get("height", icons["height"])
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        yield Icon(name, category, svg)


def draw(svg: str) -> Image.Image:
    """Rasterise one icon, centred on a white square."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=PICTURE_SIZE, height=PICTURE_SIZE, background="white")
    drawn = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    picture = Image.new("RGB", (PICTURE_SIZE, PICTURE_SIZE), "white")
    picture.paste(drawn, ((PICTURE_SIZE - drawn.width) // 2, (PICTURE_SIZE - drawn.height) // 2))
    return picture


def render_style(style: str, package: str, folder: Path) -> Iterator[dict[str, str]]:
    """Write the pictures of one icon set; yield their metadata rows."""
    (folder / style).mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for icon in tqdm(list(visible_icons(*download_package(package))), desc=style):
        picture = draw(icon.svg)
        digest = hashlib.sha256(picture.tobytes()).hexdigest()
        if digest in seen:
            continue
        seen.add(digest)
        file_name = f"{style}/{icon.name}.webp"
        picture.save(folder / file_name, lossless=True, method=6)
        yield {
            "file_name": file_name,
            "name": icon.name.replace("-", " "),
            "style": style,
            "category": icon.category,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder to write (default: %(default)s)")
    parser.add_argument(
        "--package",
        action="append",
        default=[],
        metavar="STYLE=PACKAGE",
        help="an @iconify-json package with its version, repeatable (default: the two that the demo model knows)",
    )
    args = parser.parse_args()

    packages = dict(item.split("=", 1) for item in args.package) or PACKAGES
    rows = [row for style, package in packages.items() for row in render_style(style, package, args.data)]
    (args.data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{len(rows)} pictures, {len({row['name'] for row in rows})} names, in {args.data}")


if __name__ == "__main__":
    main()
