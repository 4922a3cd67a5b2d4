"""Every setting of our policies and of the rivals' on the 16-bit demo: PSNR and SSIM to its uncached pictures, against
block FLOPs and time.

uv run --with cache-dit==1.5.3 python packages/nunchaku-cache/benchmarks/sweep.py -o benchmarks/cache_sweep.json

Without cache-dit that rival is left out. Schedules and MagCache's ratios are found on other prompts than are compared.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from tqdm import tqdm

from nunchaku_cache.bench.sweep import Failure, Point, compare, sweep
from nunchaku_kernels.bench import report
from nunchaku_models import demo
from nunchaku_models.demo.prompts import LONG_LIST
from nunchaku_models.evaluation import metrics

CALIBRATION_PROMPTS = 16


class DemoModel:
    """The demo in 16 bits; see `nunchaku_cache.bench.measure.Demo`."""

    def __init__(self, prompts: int) -> None:
        self._prompts = prompts

    def pipeline(self) -> Any:
        return FluxPipeline.from_pretrained(demo.PIPELINE, torch_dtype=torch.bfloat16)

    def arguments(self) -> dict[str, Any]:
        return demo.defaults()

    def prompts(self) -> Sequence[str]:
        return [f"{name}, noto style" for name in LONG_LIST[-self._prompts :]]

    def calibration_prompts(self) -> Sequence[str]:
        return [f"{name}, noto style" for name in LONG_LIST[:CALIBRATION_PROMPTS]]

    def psnr(self, picture: Any, reference: Any) -> float:
        return metrics.psnr(picture, reference)

    def ssim(self, picture: Any, reference: Any) -> float:
        return metrics.ssim(picture, reference)


def main() -> None:
    """Measure, compare at equal FLOPs, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 28, 50])
    parser.add_argument("--prompts", type=int, default=12, help="pictures per setting (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="pictures per call (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="the fastest counts (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    points: list[Point] = []
    failures: list[Failure] = []
    for steps in arguments.steps:
        with tqdm(desc=f"{steps} steps", unit="setting", mininterval=5) as bar:

            def on_setting(name: str, total: int, bar: Any = bar) -> None:
                bar.total = total
                bar.update()

            for found in sweep(
                DemoModel(arguments.prompts),
                steps=steps,
                batch=arguments.batch,
                device=arguments.device,
                rounds=arguments.rounds,
                on_setting=on_setting,
            ):
                (points if isinstance(found, Point) else failures).append(found)  # type: ignore[arg-type]
    rows = compare(points)
    for row in rows:
        print(json.dumps(row))
    result = {
        **report([]),
        "prompts": arguments.prompts,
        "rows": rows,
        "points": [asdict(point) for point in points],
        "failures": [asdict(failure) for failure in failures],
    }
    scratch = arguments.output.with_suffix(".tmp")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(arguments.output)


if __name__ == "__main__":
    main()
