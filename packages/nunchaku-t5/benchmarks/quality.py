"""How much of a T5 encoder 4 bits keep: rivals, and what each step of ours buys.

    python packages/nunchaku-t5/benchmarks/quality.py [demo] [synthetic] [layers] [pictures] [--json FILE]

Needs nunchaku-models (the demo), and bitsandbytes for its row. Errors are `1 - cosine` of the last hidden states to
those of the bfloat16 model, token by token, after the mean over all tokens is subtracted; padding is left out.
Calibrated rows have seen some of the captions; `held-out` are the others. Retrieval looks for a caption among those
that the same model computes in float32: bfloat16 itself misses some, which differ by less than its rounding.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from recipes import BEST, RIVALS, STEPS, STORED_DTYPE, Encoder, Quantized, Recipe
from synthetic import synthetic_encoder, synthetic_texts
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer, T5EncoderModel

from nunchaku_kernels.bench.report import Row, report, table
from nunchaku_models import demo
from nunchaku_models.demo.judge import classify, load_judge
from nunchaku_models.demo.prompts import LONG_LIST, SHORT_LIST
from nunchaku_models.evaluation.drawing import draw
from nunchaku_models.evaluation.metrics import psnr
from nunchaku_models.generation import call_arguments, load_pipeline
from nunchaku_t5.calibration import Batch

BASELINE = "rtn-g128"
STYLES = ("noto", "fluent")
CALIBRATION_NAMES = 384
PIPELINE_TOKENS = 32
BATCH = 256


class Texts(NamedTuple):
    """Token ids and attention mask [C, T], and which captions calibration sees."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    calibration: torch.Tensor


def demo_texts(seed: int) -> Texts:
    """All captions of the demo: every name in either style."""
    tokenizer = AutoTokenizer.from_pretrained(demo.PIPELINE / "tokenizer_2")
    names = json.loads((demo.FOLDER / "classes.json").read_text())
    chosen = set(random.Random(seed).sample(names, CALIBRATION_NAMES))
    captions = [f"{name}, {style} style" for name in names for style in STYLES]
    tokens = tokenizer(captions, padding="max_length", max_length=PIPELINE_TOKENS, truncation=True, return_tensors="pt")
    seen = torch.tensor([name in chosen for name in names for _ in STYLES])
    return Texts(tokens.input_ids, tokens.attention_mask, seen)


def calibration_batches(texts: Texts, *, padded: bool) -> list[Batch]:
    """Captions as they are read, masked; and as FLUX reads them: padded, without a mask."""
    ids, mask = texts.input_ids[texts.calibration], texts.attention_mask[texts.calibration]
    batches = [Batch(*part) for part in zip(ids.split(BATCH), mask.split(BATCH), strict=True)]
    return batches + [Batch(part, None) for part in ids[::2].split(BATCH)] if padded else batches


@torch.no_grad()
def hidden_states(model: T5EncoderModel, texts: Texts) -> torch.Tensor:
    """Last hidden states, float32 [C, T, D]."""
    parts = zip(texts.input_ids.split(BATCH), texts.attention_mask.split(BATCH), strict=True)
    return torch.cat([model(ids, mask).last_hidden_state.float() for ids, mask in parts])


class Judge:
    """Compares hidden states with those of the 16-bit model, and finds captions among those of the exact one.

    Args:
        reference: of the model in bfloat16, float32 [C, T, D].
        exact: of the same model in float32.
        texts: the captions.
    """

    def __init__(self, reference: torch.Tensor, exact: torch.Tensor, texts: Texts) -> None:
        self.counted = texts.attention_mask.bool()
        self.mean = reference[self.counted].mean(dim=0)
        self.reference, self.exact = self._centred(reference), self._centred(exact)

    def error(self, states: torch.Tensor, captions: torch.Tensor) -> float:
        """Mean `1 - cosine` over the tokens of some captions (bool [C])."""
        tokens = self.counted & captions.unsqueeze(1)
        similarity = cosine_similarity(self._centred(states)[tokens], self.reference[tokens], dim=1)
        return 1 - float(similarity.double().mean())

    def retrieval(self, states: torch.Tensor, *, pooled: bool) -> float:
        """Share of captions, in percent, whose nearest neighbour among those of the exact model is themselves.

        Args:
            states: [C, T, D].
            pooled: compare means over tokens by cosine; else whole sequences by distance, which is what a diffusion
                model sees of a caption.
        """
        mine, theirs = self._centred(states), self.exact
        if pooled:
            lengths = self.counted.sum(dim=1, keepdim=True)
            mine, theirs = (torch.nn.functional.normalize(x.sum(dim=1) / lengths, dim=1) for x in (mine, theirs))
            nearest = (mine @ theirs.t()).argmax(dim=1)
        else:
            mine, theirs = mine.flatten(1), theirs.flatten(1)
            nearest = (theirs.square().sum(dim=1) / 2 - mine @ theirs.t()).argmin(dim=1)
        return 100 * float((nearest == torch.arange(len(nearest))).float().mean())

    def _centred(self, states: torch.Tensor) -> torch.Tensor:
        return (states - self.mean) * self.counted.unsqueeze(-1)


def compared(
    prefix: str, model: T5EncoderModel, texts: Texts, batches: Sequence[Batch], recipes: dict[str, Recipe]
) -> list[Row]:
    """Rows of all recipes on one encoder.

    Args:
        prefix: of the rows' names.
        model: in float32, with weights that bfloat16 holds.
        texts: what to measure on.
        batches: what to calibrate with.
        recipes: the first is the baseline.
    """
    encoder = Encoder(model, batches)
    reference, exact = hidden_states(Quantized().applied_to(model), texts), hidden_states(model, texts)
    judge = Judge(reference, exact, texts)
    everything, unseen = torch.ones_like(texts.calibration), ~texts.calibration
    rows: list[Row] = []
    baseline: list[float] = []

    def errors(name: str, states: torch.Tensor) -> None:
        found = [judge.error(states, captions) for captions in (everything, unseen)]
        if name == BASELINE:
            baseline.extend(found)
        for what, error, against in zip(("all", "held-out"), found, baseline or (0.0, 0.0), strict=True):
            given = {"baseline": BASELINE, "ratio": against / error} if against else {}
            rows.append(Row(f"{prefix}/{name}/error/{what}", error, "1-cosine", **given))

    def retrieval(name: str, states: torch.Tensor) -> None:
        for what, pooled in (("sequence", False), ("pooled", True)):
            value = judge.retrieval(states, pooled=pooled)
            rows.append(Row(f"{prefix}/{name}/retrieval/{what}", value, "%"))

    errors("float32", exact)  # what bfloat16's own rounding costs
    retrieval("bfloat16", reference)
    for name, recipe in recipes.items():
        started = time.process_time()
        made = recipe(encoder)
        states = hidden_states(made.applied_to(model), texts)
        errors(name, states)
        say(f"{prefix}/{name}: error {rows[-1].value:.3g}, {time.process_time() - started:.0f} s of processor time")
        retrieval(name, states)
        bits = 8 * made.nbytes / sum(linear.weight.numel() for linear in encoder.linears.values())
        rows.append(Row(f"{prefix}/{name}/size", bits, "bits/weight"))
    for name, harm in encoder.sensitivities().items():
        rows.append(Row(f"{prefix}/sensitivity/{name}", harm, "|change|^2"))
    return rows


def demo_encoder() -> T5EncoderModel:
    return T5EncoderModel.from_pretrained(demo.PIPELINE / "text_encoder_2", dtype=torch.float32).eval()


def demo_rows(seed: int) -> list[Row]:
    """Everything on the demo's encoder."""
    texts = demo_texts(seed)
    batches = calibration_batches(texts, padded=True)
    return compared("t5/demo", demo_encoder(), texts, batches, {**RIVALS, **STEPS})


def synthetic_rows(seeds: Sequence[int]) -> list[Row]:
    """Everything on synthetic encoders: for each row of one seed, the geometric mean over the seeds."""
    found: list[list[Row]] = []
    for seed in seeds:
        model = synthetic_encoder(seed).to(STORED_DTYPE).float()
        ids, mask = synthetic_texts(384, seed)
        texts = Texts(ids, mask, torch.arange(len(ids)) < 192)
        rows = compared(
            f"t5/synthetic-{seed}", model, texts, calibration_batches(texts, padded=False), dict(RIVALS | STEPS)
        )
        found.append([row for row in rows if "/sensitivity/" not in row.name])
    means = []
    for group in zip(*found, strict=True):
        values, ratios = ([getattr(row, key) for row in group] for key in ("value", "ratio"))
        name = "t5/synthetic/" + group[0].name.split("/", 2)[2]
        ratio = None if ratios[0] is None else geometric_mean(ratios)
        means.append(Row(name, geometric_mean(values), group[0].unit, group[0].baseline, ratio))
    return [row for rows in found for row in rows] + means


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def layer_rows(seed: int) -> list[Row]:
    """The demo's encoder with only one linear in 4 bits, rounded to nearest: which ones hurt."""
    texts, model = demo_texts(seed), demo_encoder()
    judge = Judge(hidden_states(Quantized().applied_to(model), texts), hidden_states(model, texts), texts)
    everything = torch.ones_like(texts.calibration)
    encoder = Encoder(model, [])
    forms = RIVALS[BASELINE](encoder).forms
    rows = []
    for name, form in forms.items():
        states = hidden_states(Quantized({name: form}).applied_to(model), texts)
        rows.append(Row(f"t5/layers/only/{name}", judge.error(states, everything), "1-cosine"))
    return rows


def picture_rows(seed: int, count: int) -> list[Row]:
    """The demo's pictures with nothing but the T5 in 4 bits."""
    texts, model = demo_texts(seed), demo_encoder()
    encoder = Encoder(model, calibration_batches(texts, padded=True))
    names = (SHORT_LIST + LONG_LIST)[:count]
    prompts = [f"{name}, noto style" for name in names]
    loaded = load_pipeline(demo.PIPELINE, device="cpu")
    arguments = call_arguments(loaded.pipeline, loaded.defaults)
    judge = load_judge()
    rows: list[Row] = []
    expected = None
    for recipe in (None, BASELINE, BEST):
        parts = dict(loaded.pipeline.components)
        if recipe is not None:
            parts["text_encoder_2"] = (RIVALS | STEPS)[recipe](encoder).applied_to(model)
        label = recipe or "bf16"
        pictures = draw(type(loaded.pipeline)(**parts), prompts, seeds=1, batch=16, arguments=arguments, label=label)[0]
        right = [guesses[0].name == name for guesses, name in zip(classify(pictures, *judge), names, strict=True)]
        rows.append(Row(f"t5/pictures/{label}/semantic", 100 * float(np.mean(right)), "%"))
        if expected is None:
            expected = pictures
            continue
        values = [psnr(*pair) for pair in zip(pictures, expected, strict=True)]
        rows.append(Row(f"t5/pictures/{label}/psnr/mean", float(np.mean(values)), "dB"))
        rows.append(Row(f"t5/pictures/{label}/psnr/worst", min(values), "dB"))
    return rows


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
        "demo": lambda given: demo_rows(given.seed),
        "synthetic": lambda given: synthetic_rows(given.synthetic_seeds),
        "layers": lambda given: layer_rows(given.seed),
        "pictures": lambda given: picture_rows(given.seed, given.pictures),
    }
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help=f"of {', '.join(parts)}; default: all")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of calibration captions")
    parser.add_argument("--synthetic-seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--pictures", type=int, default=32, help="number of prompts")
    parser.add_argument("--json", type=Path, help="where to write the rows; those of other parts stay")
    given = parser.parse_args()
    for part in given.parts or parts:
        rows = parts[part](given)
        print(table(rows), flush=True)
        if given.json:
            write(rows, given.json)


def write(rows: Sequence[Row], path: Path) -> None:
    """Replace the rows of the parts that were measured; the others of the file stay."""
    result = report(rows)
    measured = {"/".join(row.name.split("/")[:2]) for row in rows}
    if path.exists():
        before = json.loads(path.read_text())["rows"]
        result["rows"] = [r for r in before if "/".join(r["name"].split("/")[:2]) not in measured] + result["rows"]
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
