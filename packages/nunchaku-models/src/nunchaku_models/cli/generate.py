"""`nunchaku generate PROMPT -o FILE`: text to picture."""

import argparse
import json
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Draw a picture from a prompt. Without --model, the small demo pipeline that ships with the project draws emoji; it
needs no network.

  nunchaku generate "a red apple, noto style" -o apple.png
  nunchaku generate "a cat" -o cat.png --model my-pipeline-int4/
  nunchaku generate "a cat" -o cat.png --model my-pipeline-int4/ --lora style.safetensors:0.8
  nunchaku generate "a cat" -o cat.png --model my-pipeline-int4/ --t5 4bit
  nunchaku generate "a cat" -o cat.png --model svdq-int4_r32-flux.1-dev.safetensors --base black-forest-labs/FLUX.1-dev

MODEL is a diffusers pipeline folder (4-bit or not), a hub id of one, or a transformer file together with --base, the
pipeline that has the rest: text encoders, VAE, scheduler. Local models need no network.
"""


def register(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "generate",
        help="draw a picture from a prompt",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="picture to write: .png, .jpg or .webp")
    parser.add_argument(
        "--negative-prompt", metavar="TEXT", help="what not to draw; needs true classifier-free guidance"
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="pipeline folder, hub id, or transformer file (default: the demo)"
    )
    parser.add_argument("--base", metavar="PIPELINE", help="pipeline that completes a transformer file")
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="LoRA file to draw with, and its strength (1); may be given several times",
    )
    parser.add_argument(
        "--t5", metavar="4bit|T5", help="draw with the T5 in 4 bits, or with a 4-bit T5 (file, folder or hub id)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise; the same on every device (0)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    parser.add_argument("--size", metavar="WxH", help="pixels, e.g. 1024x768 or 1024 (default: the model's own)")
    parser.add_argument("--guidance", type=float, help="guidance scale of guidance-distilled models")
    parser.add_argument("--true-cfg", type=float, help="classifier-free guidance scale; above 1 doubles the work")
    parser.add_argument("--device", help="torch device, e.g. cpu, cuda, cuda:1 (default: cuda if there is one)")
    parser.add_argument("--arithmetic", help="w4a8, w4a4, nvfp4 or w4a16 (default: the best the device has)")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32 (default: what suits the device)")
    parser.add_argument("--offload", action="store_true", help="keep on the GPU only the part that runs (less memory)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of sentences")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check what can be checked cheaply, load, draw, write, report."""
    from nunchaku_models.generation import (
        check_picture_path,
        check_seed,
        check_steps,
        generate,
        load_pipeline,
        parse_lora,
        parse_size,
    )

    output = check_picture_path(Path(args.output))
    size = None if args.size is None else parse_size(args.size)
    check_seed(args.seed)
    if args.steps is not None:
        check_steps(args.steps)
    if not args.verbose:
        quiet_transformers()
    loaded = load_pipeline(
        args.model,
        base=args.base,
        device=args.device,
        dtype=args.dtype,
        arithmetic=args.arithmetic,
        offload=args.offload,
        loras=[parse_lora(text) for text in args.lora],
        t5=args.t5,
    )
    report = generate(
        loaded,
        args.prompt,
        output,
        negative_prompt=args.negative_prompt,
        seed=args.seed,
        steps=args.steps,
        size=size,
        guidance=args.guidance,
        true_cfg=args.true_cfg,
    )
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(report)
    return 0


def quiet_transformers() -> None:
    """Leave out transformers' hints about optional image processors, which text-to-image does not use.

    diffusers' own warnings stay: that a prompt was cut is one of them.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
