"""`nunchaku quantize MODEL -o OUT`: a 16-bit transformer becomes a 4-bit one, layer by layer."""

import argparse
from typing import Any

DESCRIPTION = """\
Quantise a diffusion transformer to 4 bits, without calibration data. Weights are read from the mapped file and written
to the output one layer at a time, so a 24 GB model needs little memory. The output appears when it is complete: an
interrupted run leaves nothing behind, and an earlier file of that name stays.

MODEL is a diffusers folder (a pipeline or its transformer), a single .safetensors file (diffusers, BFL or ComfyUI
names; fp8, fp16, bf16 or fp32), or a hub id. OUT ending in .safetensors becomes one file in the published format;
any other OUT becomes a diffusers folder: a whole pipeline if MODEL is a local one.

  nunchaku quantize black-forest-labs/FLUX.1-dev -o flux-int4.safetensors
  nunchaku quantize my-finetune.safetensors -o my-finetune-int4.safetensors --rank 64
  nunchaku quantize my-pipeline/ -o my-pipeline-int4/
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
    parser.add_argument("--seed", type=int, default=0, help="seed of the randomised SVD (0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Quantise and say what came out."""
    from nunchaku_models.quantizer import quantize_checkpoint

    report = quantize_checkpoint(
        args.model,
        args.output,
        precision=args.precision,
        rank=args.rank,
        dtype=args.dtype,
        seed=args.seed,
        progress=not args.quiet,
    )
    for path in report.kept:
        print(f"kept in 16 bits: {path}")
    before, after = report.bytes_before, report.bytes_after
    print(
        f"wrote {report.output}: {report.quantized} layers in {args.precision}, {after / 1e6:,.1f} MB "
        f"({before / after:.2f}x smaller), {report.seconds:.1f} s"
    )
    return 0
