"""A whole XXL encoder, random weights: seconds to quantise, load and encode, and peak memory, in 16 bits and in 4.

    python packages/nunchaku-t5/benchmarks/whole.py FOLDER [--device cuda] [--calibrate N] [--json FILE]

Makes FOLDER/16-bit (9.5 GB) and FOLDER/4-bit (2.7 GB) where they are not there, and leaves them. Encoders are loaded in
processes of their own: on a CPU (of Linux) the peak is that of resident memory, mapped files included; on a GPU it is
what torch allocated there. With --calibrate the quantisation is that of `nunchaku-t5 quantize --calibrate` there, with
N texts of random words.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import T5EncoderModel, T5TokenizerFast

import nunchaku_t5  # noqa: F401 - registers the quantiser
from nunchaku_kernels.bench.report import Row, report, table
from nunchaku_t5.bench.block import VOCABULARY, t5_config

BASELINE = "torch-bf16"
REPEATS = 5
NUMBERS = 1 << 22
"""Random numbers, of which each weight is a run: to draw 4.7 billion takes longer than to measure with them."""
WORDS = 20


def make_encoder(folder: Path) -> None:
    """T5 v1.1 XXL in bfloat16, with a tokenizer of one piece a word."""
    with torch.device("meta"):
        model = T5EncoderModel(t5_config("xxl", is_encoder_decoder=False)).bfloat16()
    numbers = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0))
    model = model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 1:
                value.fill_(1.0)
                continue
            scale = 1.0 if "embed" in name or "shared" in name else value.shape[1] ** -0.5
            for part in value.view(-1).split(NUMBERS):
                part.copy_(numbers[: part.numel()]).mul_(scale)
    model.save_pretrained(folder)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -5.0)]
    pieces += [(f"▁{index}", -1.0) for index in range(VOCABULARY - len(pieces))]
    T5TokenizerFast(vocab=pieces, extra_ids=0).save_pretrained(folder)


def make_texts(file: Path, count: int) -> None:
    """Lines of random words of that tokenizer, the first ones frequent, as in a language."""
    chosen = random.Random(0)
    lines = [" ".join(str(int(chosen.random() ** 3 * 30000)) for _ in range(WORDS)) for _ in range(count)]
    file.write_text("\n".join(lines) + "\n")


@torch.no_grad()
def encode(folder: Path, device: str, tokens: list[int]) -> dict[str, float]:
    """Load and encode: seconds to load; for each length milliseconds, and the peak so far in GB."""
    start = time.perf_counter()
    model = T5EncoderModel.from_pretrained(folder, device_map=device).eval()
    found = {"load": time.perf_counter() - start}
    for length in sorted(tokens):
        ids = torch.randint(2, VOCABULARY, (1, length), device=device)
        taken = []
        for _ in range(1 + REPEATS):
            start = time.perf_counter()
            model(ids).last_hidden_state.float().sum().item()
            taken.append(time.perf_counter() - start)
        found[f"m{length}"] = sorted(taken[1:])[REPEATS // 2] * 1e3
        on_gpu = torch.device(device).type == "cuda"
        found[f"peak/m{length}"] = (torch.cuda.max_memory_allocated() if on_gpu else peak_resident()) / 1e9
    return found


def peak_resident() -> int:
    """Bytes; `ru_maxrss` would be that of the process that started this one, if it was larger."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def run(*command: object) -> tuple[float, str]:
    """Seconds and output of a Python process."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - start, done.stdout


def measure(folder: Path, device: str, tokens: list[int], texts: int) -> list[Row]:
    """Quantise, then both encoders in processes of their own."""
    rows = []
    sixteen, four = folder / "16-bit", folder / ("fitted" if texts else "4-bit")
    steps = tqdm(total=4, unit="step")
    if not sixteen.exists():
        make_encoder(sixteen)
    steps.update()
    if not four.exists():
        options: list[object] = []
        if texts:
            make_texts(folder / "texts.txt", texts)
            options = ["--calibrate", folder / "texts.txt", "--device", device]
        program = "from nunchaku_t5.cli import main; raise SystemExit(main())"
        seconds, _ = run("-c", program, "quantize", sixteen, "-o", four, *options)
        rows.append(Row(f"t5/xxl/quantize{f'/{texts}-texts' if texts else ''}", seconds, "s"))
    steps.update()
    found: dict[str, dict[str, float]] = {}
    for name, place in ((BASELINE, sixteen), ("w4a16", four)):
        lengths = [str(length) for length in tokens]
        found[name] = json.loads(run(__file__, place, "--encode", "--device", device, "--tokens", *lengths)[1])
        steps.update()
    units = {"load": "s", "peak": "GB"}  # of what begins so
    for what, value in found["w4a16"].items():
        base, unit = found[BASELINE][what], units.get(what.partition("/")[0], "ms")
        rows.append(Row(f"t5/{BASELINE}/xxl/{what}", base, unit))
        rows.append(Row(f"t5/w4a16/xxl/{what}", value, unit, BASELINE, base / value))
    return rows


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--calibrate", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--encode", action="store_true", help=argparse.SUPPRESS)  # what the processes run
    args = parser.parse_args()
    if args.encode:
        print(json.dumps(encode(args.folder, args.device, args.tokens)))
        return 0
    rows = measure(args.folder, args.device, args.tokens, args.calibrate)
    print(table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps(report(rows), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
