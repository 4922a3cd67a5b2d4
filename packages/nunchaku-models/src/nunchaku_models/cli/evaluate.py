"""`nunchaku evaluate`: how near 4-bit pictures come to 16-bit ones, with intervals."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Draw the same pictures, from the same noise, with a 16-bit transformer and with others, and say how far they are apart:
PSNR and SSIM, each with a 95 % bootstrap interval over the prompts. Rows where we lose are printed like all others.

Without --model, the demo model that ships with the project is judged in every way this project can quantise it, naive
rounding, and other 8- and 4-bit methods; the last need the packages of nunchaku-models[evaluate]. A classifier also
says whether the picture shows the object that was asked for.

  nunchaku evaluate --json --sheet sheet.png --work evaluation/
  nunchaku evaluate --rows 'svdq-int4-*/data-free' --num-prompts 16
  nunchaku evaluate --model flux-int4.safetensors --reference black-forest-labs/FLUX.1-dev --prompts prompts.txt

With --model, that pipeline is compared with --reference. MODEL is what `nunchaku generate --model` takes; REFERENCE is
a 16-bit pipeline, or with --base a 16-bit transformer. They are loaded one after the other. Both are called with what
REFERENCE's folder recommends, unless told otherwise. The prompts file is UTF-8 text with one prompt per line; lines
that begin with # do not count.
"""

DEMO_ONLY = ("num_prompts", "rows", "calibrate", "work")
PIPELINES_ONLY = ("reference", "prompts", "base", "arithmetic", "size", "guidance")


def register(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "evaluate",
        help="how near 4-bit pictures come to 16-bit ones",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--num-prompts", type=int, metavar="N", help="demo: number of objects to draw (64)")
    parser.add_argument("--rows", nargs="+", metavar="PATTERN", help="demo: only these rows, e.g. '*/data-free'")
    parser.add_argument("--calibrate", type=int, metavar="N", help="demo: calibration prompts of calibrated rows (256)")
    parser.add_argument(
        "--work", metavar="DIR", help="demo: keep the 4-bit files here, and use those that are (default: keep none)"
    )
    parser.add_argument("--model", metavar="MODEL", help="judge this pipeline or transformer instead of the demo")
    parser.add_argument("--reference", metavar="REFERENCE", help="with --model: the 16-bit pipeline")
    parser.add_argument("--prompts", metavar="FILE", help="with --model: text file, one prompt per line")
    parser.add_argument("--base", metavar="PIPELINE", help="with --model: pipeline that completes a transformer")
    parser.add_argument("--arithmetic", help="with --model: w4a8, w4a4, nvfp4 or w4a16 (default: the device's best)")
    parser.add_argument("--size", metavar="WxH", help="with --model: pixels, e.g. 1024x768 or 1024")
    parser.add_argument("--guidance", type=float, help="with --model: guidance scale of guidance-distilled models")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="pictures per prompt (1)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    parser.add_argument(
        "--batch", type=int, metavar="N", help="pictures drawn at once (demo: 32; with --model: 1, which needs least)"
    )
    parser.add_argument("--device", help="torch device, e.g. cpu, cuda, cuda:1 (default: cuda if there is one)")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32 (default: what suits the device)")
    parser.add_argument("--sheet", metavar="FILE", help="write a contact sheet here: .png, .jpg or .webp")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check what can be checked cheaply, draw, compare, report."""
    _check_options(args)
    from nunchaku_models.generation import check_picture_path, check_steps, parse_size, save_picture

    sheet = None if args.sheet is None else check_picture_path(Path(args.sheet))
    size = None if args.size is None else parse_size(args.size)
    if args.steps is not None:
        check_steps(args.steps)
    # slow imports, after what can be said without them
    from nunchaku_kernels.bench import report
    from nunchaku_models.evaluation.report import contact_sheet, markdown, report_rows
    from nunchaku_models.evaluation.run import CALIBRATION_PROMPTS, NUM_PROMPTS, evaluate_demo, evaluate_pipelines
    from nunchaku_models.evaluation.variants import select
    from nunchaku_models.prompts import read_prompts

    _quiet(args.verbose, bars=not args.quiet)
    common = {
        "seeds": args.seeds,
        "steps": args.steps,
        "device": args.device,
        "dtype": args.dtype,
        "progress": not args.quiet,
    }
    if args.model is None:
        variants = select(args.rows or [])
        evaluation = evaluate_demo(
            variants,
            num_prompts=args.num_prompts or NUM_PROMPTS,
            calibrate=args.calibrate or CALIBRATION_PROMPTS,
            work=None if args.work is None else _folder(Path(args.work).expanduser()),
            batch=args.batch or 32,
            **common,
        )
    else:
        evaluation = evaluate_pipelines(
            args.model,
            args.reference,
            read_prompts(args.prompts, minimum=2),
            base=args.base,
            size=size,
            guidance=args.guidance,
            batch=args.batch or 1,
            arithmetic=args.arithmetic,
            **common,
        )
    if sheet is not None:
        save_picture(contact_sheet(evaluation), sheet)
    for row, reason in evaluation.skipped.items():
        print(f"{row}: not run: {reason}", file=sys.stderr)
    print(json.dumps(report([*report_rows(evaluation)]), indent=2) if args.json else markdown(evaluation))
    return 0


def _quiet(verbose: bool, *, bars: bool) -> None:
    """Leave out transformers' hints about image processors, and with --quiet the bars of loading."""
    import diffusers.utils.logging
    import transformers.utils.logging

    if not verbose:
        transformers.utils.logging.set_verbosity_error()
    if not bars:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def _check_options(args: argparse.Namespace) -> None:
    """Raise `ValueError` for options that do not go together, or numbers below 1."""
    for names, wrong, why in (
        (DEMO_ONLY, args.model is not None, "is about the demo and does not go with --model"),
        (PIPELINES_ONLY, args.model is None, "needs --model"),
    ):
        for name in names:
            if wrong and getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} {why}")
    if args.model is not None and (args.reference is None or args.prompts is None):
        raise ValueError("--model needs --reference, the 16-bit pipeline, and --prompts, a text file")
    for name in ("num_prompts", "calibrate", "seeds", "batch"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= 1000:
            raise ValueError(f"--{name.replace('_', '-')} must be from 1 to 1000, got {value}")


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--work {path} cannot be used as a folder: {error.strerror or error}") from error
    return path
