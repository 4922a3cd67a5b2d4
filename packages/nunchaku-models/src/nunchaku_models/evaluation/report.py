"""An evaluation as benchmark rows and as a Markdown table."""

from collections.abc import Iterator

from PIL import Image

from nunchaku_kernels.bench import Row
from nunchaku_models.evaluation.metrics import Interval, bootstrap, share
from nunchaku_models.evaluation.run import Evaluation, Scores
from nunchaku_models.evaluation.sheet import comparison_sheet


def report_rows(evaluation: Evaluation) -> Iterator[Row]:
    """Everything measured, one number per row; the ends of an interval are rows of their own."""
    setup = {
        "prompts": len(evaluation.prompts),
        "seeds": evaluation.seeds,
        "steps": evaluation.steps,
        "calibration-prompts": evaluation.calibrate,
    }
    for name, number in setup.items():
        if number is not None:
            yield Row(f"setup/{name}", number, name.rpartition("-")[2])
    against = f"{evaluation.reference} pictures"
    right16 = None
    if evaluation.right is not None:
        right16 = share(evaluation.right)
        yield from _with_interval(f"semantic/{evaluation.reference}", right16, "% right")
    for row, scores in evaluation.scores.items():
        yield from _with_interval(f"psnr/{row}", bootstrap(scores.psnr), "dB", against)
        yield Row(f"psnr-worst/{row}", float(scores.psnr.min()), "dB", against)
        yield from _with_interval(f"ssim/{row}", bootstrap(scores.ssim), "", against)
        if scores.right is not None and right16 is not None:
            right = share(scores.right)
            ratio = right.mean / right16.mean if right16.mean else None
            yield from _with_interval(f"semantic/{row}", right, "% right", evaluation.reference, ratio)
    for better, worse, interval in gains(evaluation):
        yield from _with_interval(f"gain/{better}-over-{worse}", interval, "dB", worse)


def gains(evaluation: Evaluation) -> Iterator[tuple[str, str, Interval]]:
    """(row, other row, paired difference of their PSNR in dB) for every pair that was drawn."""
    scores = evaluation.scores
    for better, worse in evaluation.gains:
        if better in scores and worse in scores:
            yield better, worse, bootstrap(scores[better].psnr - scores[worse].psnr)


def markdown(evaluation: Evaluation) -> str:
    """Tables to paste: rows in the order drawn, then paired gains, then what was not run."""
    judged = evaluation.right is not None
    lines = [
        f"{len(evaluation.prompts)} prompts x {evaluation.seeds} seed{'s' * (evaluation.seeds > 1)}, "
        f"{evaluation.steps} steps, against the {evaluation.reference} pictures; in brackets: 95 % bootstrap intervals "
        "over prompts.",
        "",
        "| | PSNR, mean | worst | SSIM |" + " judged right |" * judged,
        "|---|---|---|---|" + "---|" * judged,
    ]
    if evaluation.right is not None:
        lines.append(f"| {evaluation.reference} | | | | {_percent(share(evaluation.right))} |")
    lines += [_table_row(row, scores) for row, scores in evaluation.scores.items()]
    pairs = [*gains(evaluation)]
    if pairs:
        lines += ["", "| PSNR, picture by picture | over | gain |", "|---|---|---|"]
        lines += [f"| {better} | {worse} | {_shown(gain, '+.2f')} dB |" for better, worse, gain in pairs]
    return "\n".join(lines)


def contact_sheet(evaluation: Evaluation) -> Image.Image:
    """The first prompts in every row, labelled with the row's mean PSNR."""
    notes = {row: f"{bootstrap(scores.psnr).mean:.1f} dB" for row, scores in evaluation.scores.items()}
    return comparison_sheet(evaluation.prompts, evaluation.thumbnails, notes)


def _table_row(row: str, scores: Scores) -> str:
    cells = [
        row.replace("|", "\\|"),
        f"{_shown(bootstrap(scores.psnr), '.1f')} dB",
        f"{scores.psnr.min():.1f} dB",
        _shown(bootstrap(scores.ssim), ".3f"),
    ]
    if scores.right is not None:
        cells.append(_percent(share(scores.right)))
    return f"| {' | '.join(cells)} |"


def _percent(interval: Interval) -> str:
    return f"{_shown(interval, '.1f')} %"


def _shown(interval: Interval, form: str) -> str:
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def _with_interval(
    name: str, interval: Interval, unit: str, baseline: str | None = None, ratio: float | None = None
) -> Iterator[Row]:
    yield Row(name, interval.mean, unit, baseline, ratio)
    yield Row(f"{name}/ci95-low", interval.low, unit, baseline)
    yield Row(f"{name}/ci95-high", interval.high, unit, baseline)
