"""`nunchaku quantize MODEL -o OUT`: a 16-bit transformer becomes a 4-bit one, layer by layer."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Quantise a diffusion transformer to 4 bits. Weights are read from the mapped file and written
to the output one layer at a time, so a 24 GB model needs little memory. The output appears when it is complete: an
interrupted run leaves nothing behind, and an earlier file of that name stays.

MODEL is a diffusers folder (a pipeline or its transformer), a single .safetensors file (diffusers, BFL or ComfyUI
names; fp8, fp16, bf16 or fp32), or a hub id. OUT ending in .safetensors becomes one file in the published format;
any other OUT becomes a diffusers folder: a whole pipeline if MODEL is a local one.

  nunchaku quantize black-forest-labs/FLUX.1-dev -o flux-int4.safetensors
  nunchaku quantize my-finetune.safetensors -o my-finetune-int4.safetensors --rank 64
  nunchaku quantize my-pipeline/ -o my-pipeline-int4/

Without --calibrate no data is needed. With it, the pipeline draws prompts and every layer is fitted to the inputs it
gets: better pictures from files of the same format and size. It takes longer, and the 16-bit pipeline must run here.
Interrupted, it goes on where it was when the same command is given again.

  nunchaku quantize my-pipeline/ -o out.safetensors --calibrate 256
  nunchaku quantize finetune.safetensors -o out.safetensors --calibrate prompts.txt --base black-forest-labs/FLUX.1-dev
"""


def register(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "quantize",
        help="make a 4-bit model from a 16-bit one",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="diffusers folder, single file or hub id")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="file (.safetensors) or folder to write")
    parser.add_argument("--precision", default="int4", help="int4 (default) or nvfp4")
    parser.add_argument(
        "--rank", type=int, default=32, help="rank of the 16-bit low-rank branch, a multiple of 16; 0: no branch (32)"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", help="dtype of the 16-bit tensors: bfloat16 (default) or float16"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (0)")
    parser.add_argument(
        "--recipe",
        help="data-free (default); refined (default with --calibrate); svdquant, as published; rtn, plain rounding",
    )
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibrate", metavar="N|FILE", help="draw N built-in prompts, or those of a text file, one per line"
    )
    calibration.add_argument(
        "--gptq", action="store_true", help="round the residual of svdquant with GPTQ (refined does so by itself)"
    )
    calibration.add_argument("--base", metavar="PIPELINE", help="pipeline that completes a transformer file")
    calibration.add_argument(
        "--arithmetic", help="how layers will be multiplied: w4a4 (default), w4a8; nvfp4 for --precision nvfp4"
    )
    calibration.add_argument("--steps", type=int, help="denoising steps (default: the pipeline's own)")
    calibration.add_argument("--size", metavar="WxH", help="pixels (default: the pipeline's own)")
    calibration.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's own)")
    calibration.add_argument("--device", help="torch device (default: cuda if there is one)")
    calibration.add_argument("--offload", action="store_true", help="keep on the GPU only the part that runs")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Quantise and say what came out."""
    from nunchaku_models.calibration.run import work_path
    from nunchaku_models.cli.generate import quiet_transformers
    from nunchaku_models.generation import check_steps, parse_size
    from nunchaku_models.prompts import read_prompts
    from nunchaku_models.quantizer import quantize_checkpoint

    calibrate: int | list[str] | None = None
    if args.calibrate is not None:
        calibrate = int(args.calibrate) if re.fullmatch(r"\d{1,9}", args.calibrate) else read_prompts(args.calibrate)
    if args.steps is not None:
        check_steps(args.steps)
    if calibrate is not None and not args.verbose:
        quiet_transformers()
    try:
        report = quantize_checkpoint(
            args.model,
            args.output,
            precision=args.precision,
            rank=args.rank,
            dtype=args.dtype,
            seed=args.seed,
            progress=not args.quiet,
            recipe=args.recipe,
            calibrate=calibrate,
            gptq=args.gptq,
            base=args.base,
            arithmetic=args.arithmetic,
            device=args.device,
            offload=args.offload,
            steps=args.steps,
            size=None if args.size is None else parse_size(args.size),
            guidance=args.guidance,
        )
    except KeyboardInterrupt:
        unfinished = work_path(Path(args.output).expanduser())
        if unfinished.is_dir():
            print(
                f"nunchaku: {unfinished} keeps what is finished; the same command goes on from there", file=sys.stderr
            )
        raise
    for path in report.kept:
        print(f"kept in 16 bits: {path}")
    before, after = report.bytes_before, report.bytes_after
    print(
        f"wrote {report.output}: {report.quantized} layers in {args.precision}, {after / 1e6:,.1f} MB "
        f"({before / after:.2f}x smaller), {report.seconds:.1f} s"
    )
    return 0
