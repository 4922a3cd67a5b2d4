"""Time and memory of `nunchaku quantize` on real-size FLUX blocks, extrapolated to FLUX.1-dev.

Writes a transformer of one block with random heavy-tailed weights, quantises it with the command line in a process of
its own, and watches that process: seconds of work (after the imports), and resident memory that is not the mapped
file.

    python packages/nunchaku-models/benchmarks/quantize_block.py --output benchmarks/quantize_block.json
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from nunchaku_kernels.bench import Row, report
from nunchaku_models.checkpoints import StreamingWriter, TensorInfo

JOINT_BLOCKS, SINGLE_BLOCKS = 19, 38
LIMIT_SECONDS, LIMIT_GIGABYTES = 15 * 60.0, 1.5


def write_model(file: Path, joint: int, single: int, heads: int) -> int:
    """Write a random FLUX transformer with heads of 128 channels; returns its number of parameters."""
    config = {
        "num_layers": joint,
        "num_single_layers": single,
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "in_channels": 64,
        "guidance_embeds": True,
    }
    with torch.device("meta"):
        state = FluxTransformer2DModel(**config).state_dict()
    generator = torch.Generator().manual_seed(0)
    infos = [TensorInfo(name, torch.bfloat16, tuple(value.shape)) for name, value in state.items()]
    with StreamingWriter(file, infos, {"config": json.dumps(config)}) as writer:
        for info in infos:
            value = torch.randn(info.shape, generator=generator)
            if len(info.shape) == 2:  # Student's t with few degrees of freedom: as heavy-tailed as trained weights
                value /= torch.rand(info.shape, generator=generator).mul_(0.75).add_(0.25)
                value *= 0.02
            writer.write(info.name, value.bfloat16())
    return sum(value.numel() for value in state.values())


def resident_beyond(pid: int, file: Path) -> int:
    """Resident bytes of a process, without those that are pages of `file`."""
    total = mapped = 0
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(file))
        elif line.startswith("Rss:"):
            size = int(line.split()[1]) * 1024
            total += size
            mapped += size if inside else 0
    return total - mapped


def measure(source: Path, output: Path, precision: str, rank: int) -> tuple[float, float, int]:
    """Seconds of work, seconds of the whole process, peak resident bytes beyond the mapped source."""
    # what is timed is the work: the slow imports come first
    program = "from diffusers import FluxTransformer2DModel; from nunchaku_models.cli.main import main; main()"
    command = [sys.executable, "-c", program, "quantize", str(source), "-o", str(output)]
    command += ["--precision", precision, "--rank", str(rank), "--quiet"]
    started = time.monotonic()
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # as the command sets it before torch is loaded
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                peak = max(peak, resident_beyond(process.pid, source))
            except OSError:  # it ended meanwhile
                return
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    said, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(process.returncode)
    match = re.search(r"([\d.]+) s$", said.strip())
    assert match is not None, said
    return float(match[1]), time.monotonic() - started, peak


def main() -> None:
    """Measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=24, help="attention heads of 128 channels (24: real size)")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="where to put the temporary files (0.7 GB)")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    args = parser.parse_args()
    rows: list[Row] = []
    work: dict[str, float] = {}
    what = f"{args.precision}-r{args.rank}"
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source, output = Path(folder).resolve() / "source.safetensors", Path(folder) / "out.safetensors"
        for name, joint, single in (("joint", 1, 0), ("single", 0, 1)):
            write_model(source, joint, single, args.heads)
            work[name], process, peak = measure(source, output, args.precision, args.rank)
            rows.append(Row(f"quantize/flux-{name}-block/{what}", work[name], "s"))
            rows.append(Row(f"quantize/flux-{name}-block/{what}/whole process", process, "s"))
            memory = peak / 1e9
            limit = f"limit {LIMIT_GIGABYTES} GB"
            rows.append(Row(f"quantize/flux-{name}-block/{what}/memory", memory, "GB", limit, LIMIT_GIGABYTES / memory))
    # too much rather than too little: every block is counted with the embedders of its one-block model
    whole = JOINT_BLOCKS * work["joint"] + SINGLE_BLOCKS * work["single"]
    limit = f"limit {LIMIT_SECONDS:.0f} s"
    rows.append(Row(f"quantize/flux.1-dev/{what}/extrapolated", whole, "s", limit, LIMIT_SECONDS / whole))
    text = json.dumps(report(rows), indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
