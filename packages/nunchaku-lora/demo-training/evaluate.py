"""Does the demo draw a style that it learnt from a LoRA? Compare LoRAs trained on the 16-bit and on the 4-bit model.

Every LoRA is drawn with on both models. Of all drawings of all styles in the data, the one that differs least from a
picture (mean squared difference) should be the one that was asked for, that object in that style, or at least a drawing
in that style. Writes the figures as JSON, and a sheet.

Needs nunchaku-models for the demo, and pictures that its `demo-training/render.py` drew in all three styles.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image
from train import HELD_OUT, TRAINED

import nunchaku_lora
from nunchaku_models import NunchakuFluxTransformer2DModel, demo
from nunchaku_models.demo.prompts import SHORT_LIST
from nunchaku_models.demo.sheet import draw_sheet
from nunchaku_models.evaluation.drawing import draw

STYLE = "twemoji"
SHEET = tuple(name for name in SHORT_LIST if name not in HELD_OUT)[:16]


class Drawings:
    """All drawings of all styles, to look up what a picture resembles most."""

    def __init__(self, folder: Path) -> None:
        self.rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        flat = [self._flat(Image.open(folder / row["file_name"])) for row in self.rows]
        self.pixels = torch.stack(flat)
        self.squares = self.pixels.square().sum(dim=1)

    @staticmethod
    def _flat(picture: Image.Image) -> torch.Tensor:
        """A quarter of the resolution is enough to tell them apart, (32 * 32 * 3) float32 in 0 .. 1."""
        small = picture.convert("RGB").resize((32, 32), Image.Resampling.BOX)
        return torch.from_numpy(np.asarray(small, np.float32) / 255).flatten()

    def nearest(self, pictures: Sequence[Image.Image]) -> list[tuple[str, str]]:
        """Name and style of the drawing that differs least from each picture."""
        asked = torch.stack([self._flat(picture) for picture in pictures])
        found = (self.squares - 2 * asked @ self.pixels.T).argmin(dim=1)
        return [(self.rows[i]["name"], self.rows[i]["style"]) for i in found.tolist()]


def load(bits: int) -> Any:
    """The demo's pipeline with its 16-bit or 4-bit transformer."""
    own = {} if bits == 16 else {"transformer": NunchakuFluxTransformer2DModel.from_pretrained(demo.TRANSFORMER_INT4)}
    pipe = FluxPipeline.from_pretrained(demo.PIPELINE, torch_dtype=torch.bfloat16, **own)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    """Draw, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="image folder of render.py, all styles")
    parser.add_argument("--lora16", type=Path, required=True, help="LoRA trained on the 16-bit model")
    parser.add_argument("--lora4", type=Path, required=True, help="LoRA trained on the 4-bit model")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--sheet", type=Path, help="picture to write: without, 16-bit, 4-bit; held-out objects last")
    parser.add_argument("--seeds", type=int, default=1, help="pictures per object (default: %(default)s)")
    arguments = parser.parse_args()

    drawings = Drawings(arguments.data)
    nunchaku_lora.enable()
    files = {"no LoRA": None, "trained on 16 bits": arguments.lora16, "trained on 4 bits": arguments.lora4}
    rows, shown = [], {}
    for bits in (16, 4):
        pipe = load(bits)
        for label, file in files.items():
            if file is not None:
                pipe.load_lora_weights(str(file), adapter_name=STYLE)
            for group, names in (("trained", TRAINED), ("held-out", HELD_OUT)):
                drawn = draw(
                    pipe,
                    [f"{name}, {STYLE} style" for name in names],
                    seeds=arguments.seeds,
                    batch=16,
                    arguments=demo.defaults(),
                    label=f"{bits} bits, {label}, {group}",
                )
                shown[bits, label, group] = drawn[0]
                found = [drawings.nearest(pictures) for pictures in drawn]
                right = [guess == (name, STYLE) for row in found for guess, name in zip(row, names, strict=True)]
                styled = [style == STYLE for row in found for _, style in row]
                what = f"{bits} bits/{label}/{group} objects"
                for measure, hits in (("object in the style", right), ("style", styled)):
                    share = round(100 * sum(hits) / len(hits), 1)
                    rows.append({"name": f"{measure}/{what}", "value": share, "unit": "%", "pictures": len(hits)})
                    print(json.dumps(rows[-1]), flush=True)
            if file is not None:
                pipe.unload_lora_weights()
    result = {"seeds": arguments.seeds, "torch": torch.__version__, "rows": rows}
    scratch = arguments.output.with_suffix(".tmp")
    scratch.write_text(json.dumps(result, indent=2) + "\n")
    scratch.replace(arguments.output)
    if arguments.sheet:
        # Each model with the LoRA that was trained on it.
        columns = [(4, "no LoRA"), (16, "trained on 16 bits"), (4, "trained on 4 bits")]
        pictures, captions = [], []
        for group, chosen in (("trained", SHEET[:8]), ("trained", SHEET[8:]), ("held-out", HELD_OUT)):
            names = TRAINED if group == "trained" else HELD_OUT
            for key in columns:
                pictures += [shown[*key, group][names.index(name)] for name in chosen]
                captions += list(chosen) if key == columns[-1] else [""] * len(chosen)
        draw_sheet(pictures, captions).save(arguments.sheet, quality=92, method=6)


if __name__ == "__main__":
    main()
