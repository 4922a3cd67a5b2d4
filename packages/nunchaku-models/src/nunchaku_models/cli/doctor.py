"""`nunchaku doctor`: what this machine can run, and why not more."""

import argparse
import json
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = (
    "nunchaku-kernels",
    "nunchaku-models",
    "nunchaku-lora",
    "nunchaku-cache",
    "nunchaku-t5",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
)

DESCRIPTION = """\
Look at this machine and this installation: packages, compiled kernels, devices, and the arithmetic that 4-bit layers
pick on each device. Exit code 0 if pictures can be made, 1 if something is broken.
"""


def register(subparsers: Any) -> None:
    """Add the command's parser."""
    parser = subparsers.add_parser(
        "doctor",
        help="what this machine can run, and why not more",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if there are problems."""
    from nunchaku_kernels.doctor import examine
    from nunchaku_models import demo

    report = examine().to_dict()
    report["packages"] = {name: _version(name) for name in PACKAGES}
    report["demo"] = demo.is_complete()
    if not report["demo"]:
        report["problems"].append("the demo pipeline is missing from nunchaku-models: reinstall it")
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 1 if report["problems"] else 0


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _print(report: dict[str, Any]) -> None:
    print("packages")
    for name, found in report["packages"].items():
        print(f"  {name:<18} {found or '-'}")
    kernels = ", ".join(report["isas"]) if report["extension"] else "not built"
    print(f"python {report['python']}, {report['threads']} threads, CPU kernels: {kernels}")
    print(f"demo pipeline: {'there' if report['demo'] else 'missing'}")
    for device in report["devices"]:
        picked = ", ".join(f"{precision} as {arithmetic}" for precision, arithmetic in device["arithmetic"].items())
        print(f"{device['device']} ({device['name']}): {picked}")
        for note in device["notes"]:
            print(f"  - {note}")
    for problem in report["problems"]:
        print(f"problem: {problem}")
