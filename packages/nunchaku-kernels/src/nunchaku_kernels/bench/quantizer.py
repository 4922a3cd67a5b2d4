"""What each step of quantising a layer buys, from round-to-nearest to `quantize_refined`, on layers made up for it.

A layer is seeded. Its weight is normal times log-normal (sigma 1/2) entries plus 0.4 of their variance in 64 directions
of strength i^-0.7; its columns are log-normal in size (sigma 0.4). Its input has 512 common directions of variance 1/i,
9 % of independent noise, a mean per channel (0.3), tokens (sigma 0.4) and channels (sigma 0.5) of log-normal size, and
one channel of 256 eight times as large; it is rounded to bf16. A layer with more inputs than outputs is a
down-projection: its input goes through a GELU. The tokens to measure on are another draw than those to calibrate on.
Real layers differ: this ranks recipes, and foretells nobody's pictures.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.nn.functional import gelu

from nunchaku_kernels.bench.report import Row
from nunchaku_kernels.formats import SVDQWeights
from nunchaku_kernels.formats.svdq import GROUP_SIZES, Precision
from nunchaku_kernels.ops.arithmetic import Arithmetic, check_arithmetic
from nunchaku_kernels.quantize import (
    InputMoments,
    InputSpans,
    Refined,
    candidates,
    published_candidates,
    quantize_refined,
    quantize_svdq,
    relative_output_error,
    truncated_svd,
)
from nunchaku_kernels.quantize.gptq import damped_cholesky, descend, gptq
from nunchaku_kernels.quantize.refine import reduced_rank_regression
from nunchaku_kernels.quantize.residual import QuantizedResidual, quantize_residual

RANK = 32
SHAPES = ((3072, 9216), (3072, 12288), (12288, 3072), (3072, 3072))
"""(K, N) of FLUX: q, k and v; up; down, behind its GELU; attention output."""
QUICK_SHAPES = ((256, 512), (512, 256))

PUBLISHED = ("naive", "smooth", "svd", "svdquant", "svdquant-gptq")
"""The published quantiser, step by step: round to nearest; with its smoothing; with a branch of rank 32; with branch
and residual fitted in turns, which is the baseline; with GPTQ."""
OURS = ("smooth-ours", "svdquant-searched", "svdquant-ours", "svdquant-ours-gptq", "refined")
"""Our smoothing, without a branch; the baseline with searched scales; with our smoothing too; with GPTQ too; and
`quantize_refined`."""
ABLATIONS = ("refined-no-descent", "refined-no-regression", "refined-no-awareness", "refined-fixed-prior")
"""Refined without coordinate descent; with the branch taken from the weights; with the residual rounded to what the
branch leaves of the weights, as if activations were not quantised; with a prior of 0.01 instead of a judged one."""
STEPS = (*PUBLISHED, *OURS, *ABLATIONS)
BASELINE = "svdquant"

_GELU_SHIFT = 0.171875
_MAX_FITS = 100
_REFINED_ITERS = 3
_FIXED_PRIOR = 0.01
_JUDGED_TOKENS = 512
_TEST_TOKENS = 1024
_DIRECTIONS = 512
_CHUNK = 8192
_JITTER = 1e-6

T = TypeVar("T")


@dataclass(frozen=True)
class Layer:
    """A linear and tokens it sees: `fit` and `held_out` to calibrate on, `test` to measure on."""

    weight: torch.Tensor
    shift: float
    fit: torch.Tensor
    held_out: torch.Tensor
    test: torch.Tensor


def synthetic_layer(
    in_features: int, out_features: int, tokens: int, *, seed: int = 0, shift: bool = True, device: str = "cpu"
) -> Layer:
    """The layer of a shape; see the module. Made on the CPU, the same for every device.

    Args:
        in_features, out_features: K, N.
        tokens: to calibrate on, a quarter of them held out.
        seed: of everything.
        shift: whether the input behind a GELU is shifted, as int4 has it.
        device: where the tensors end up.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weight = normal(out_features, in_features) * normal(out_features, in_features).mul_(0.5).exp_()
    strengths = 0.5 * torch.arange(1, 65) ** -0.7
    weight += (normal(out_features, 64) * strengths) @ normal(64, in_features)
    weight *= 0.02 * normal(in_features).mul(0.4).exp()

    variances = 1 / torch.arange(1, min(_DIRECTIONS, in_features) + 1)
    directions = normal(len(variances), in_features) * (variances / variances.sum()).sqrt().unsqueeze(1)
    means, sizes = 0.3 * normal(in_features), normal(in_features).mul(0.5).exp()
    sizes[torch.randperm(in_features, generator=generator)[: in_features // 256]] *= 8
    behind_gelu = in_features > out_features

    def draw(count: int) -> torch.Tensor:
        x = normal(count, len(directions)) @ directions + 0.3 * normal(count, in_features)
        x = (x * normal(count, 1).mul(0.4).exp() + means) * sizes
        return (gelu(x, approximate="tanh") if behind_gelu else x).bfloat16().to(device)

    held_out = tokens // 4
    return Layer(
        weight.to(device),
        _GELU_SHIFT if behind_gelu and shift else 0.0,
        draw(tokens - held_out),
        draw(held_out),
        draw(_TEST_TOKENS),
    )


def bench_quantizer(
    shapes: Iterable[tuple[int, int]] = SHAPES,
    *,
    precision: Precision = "int4",
    arithmetic: Arithmetic | None = None,
    tokens: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    on_step: Callable[[str], None] = lambda name: None,
) -> Iterator[Row]:
    """Relative output error on test tokens, and the time a recipe takes from weights and tokens to 4-bit weights.

    Ablations take over the prior that was judged, and are not timed.

    Args:
        shapes: (K, N).
        precision: "int4" or "nvfp4".
        arithmetic: how activations are quantised; None for "w4a4" or "nvfp4".
        tokens: to calibrate on; None for 4 K, at most 16384.
        seed: of layers and tokens.
        device: "cpu", "cuda".
        on_step: told the name of each step before it starts.

    Raises:
        ValueError: an argument that does not fit.
    """
    if precision not in GROUP_SIZES:
        raise ValueError(f"precision: expected 'int4' or 'nvfp4', got {precision!r}")
    arithmetic = arithmetic or ("w4a4" if precision == "int4" else "nvfp4")
    check_arithmetic("bench", precision, arithmetic)
    if tokens is not None and tokens < 8:
        raise ValueError(f"tokens: expected at least 8, got {tokens}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that this machine has, got {device!r}")
    for in_features, out_features in shapes:
        if in_features % 64 or min(in_features, out_features) < 64:
            raise ValueError(
                f"shape: expected K a multiple of 64 and N at least 64, got {in_features} and {out_features}"
            )
        layer = synthetic_layer(
            in_features,
            out_features,
            tokens or min(4 * in_features, 16384),
            seed=seed,
            shift=precision == "int4",
            device=device,
        )
        yield from _rows(f"K{in_features}-N{out_features}", Recipes(layer, precision, arithmetic), on_step)


def _rows(name: str, recipes: "Recipes", on_step: Callable[[str], None]) -> Iterator[Row]:
    errors = {}
    for step in STEPS:
        on_step(f"{step}/{name}")
        errors[step] = 100 * recipes.error(recipes.weights(step), recipes.layer.test)
    for step, error in errors.items():
        if step == BASELINE:
            yield Row(f"quantizer/{step}/{name}/error", error, "%")
        else:
            yield Row(f"quantizer/{step}/{name}/error", error, "%", BASELINE, errors[BASELINE] / error)
    for step in (*PUBLISHED, *OURS):
        yield Row(f"quantizer/{step}/{name}/seconds", recipes.seconds[step], "s")


class Recipes:
    """All steps on one layer. What several of them need is made once; its time counts in each."""

    def __init__(self, layer: Layer, precision: Precision, arithmetic: Arithmetic) -> None:
        self.layer = layer
        self.precision = precision
        self.arithmetic = arithmetic
        self.seconds: dict[str, float] = {}
        self._judged = layer.fit[:: max(1, len(layer.fit) // _JUDGED_TOKENS)]
        self._made: dict[str, tuple[Any, float]] = {}
        self._reused = 0.0

    def error(self, weights: SVDQWeights, x: torch.Tensor) -> float:
        layer = self.layer
        return relative_output_error(layer.weight, None, weights, x, shift=layer.shift, arithmetic=self.arithmetic)

    def weights(self, step: str) -> SVDQWeights:
        """The layer quantised by one step's recipe; how long that takes is noted in `seconds`."""
        recipes: dict[str, Callable[[], SVDQWeights]] = {
            "naive": lambda: self._svdq(None, rank=0),
            "smooth": lambda: self._svdq(self._smooth(published=True), rank=0),
            "svd": lambda: self._svdq(self._smooth(published=True)),
            "svdquant": lambda: self._svdq(self._smooth(published=True), in_turns=True),
            "svdquant-gptq": lambda: self._svdq_with_gptq(self._smooth(published=True)),
            "smooth-ours": lambda: self._svdq(self._smooth(), rank=0),
            "svdquant-searched": lambda: self._svdq(self._smooth(published=True), in_turns=True, scale_search=True),
            "svdquant-ours": lambda: self._svdq(self._smooth(), in_turns=True, scale_search=True),
            "svdquant-ours-gptq": lambda: self._svdq_with_gptq(self._smooth(), scale_search=True),
            "refined": lambda: self._refined().weights,
            "refined-no-descent": lambda: self.fitted(descent=False),
            "refined-no-regression": lambda: self.fitted(regression=False),
            "refined-no-awareness": lambda: self.fitted(awareness=False),
            "refined-fixed-prior": lambda: self.fitted(prior=_FIXED_PRIOR),
        }
        self._reused, start = 0.0, self._now()
        result = recipes[step]()
        self.seconds[step] = self._now() - start + self._reused
        return result

    def _now(self) -> float:
        if self.layer.weight.is_cuda:
            torch.cuda.synchronize(self.layer.weight.device)
        return time.perf_counter()

    def _once(self, name: str, make: Callable[[], T]) -> T:
        if name in self._made:
            self._reused += self._made[name][1]
        else:
            start = self._now()
            self._made[name] = make(), self._now() - start
        made: T = self._made[name][0]
        return made

    def _svdq(
        self,
        smooth: torch.Tensor | None,
        *,
        rank: int = RANK,
        in_turns: bool = False,
        scale_search: bool = False,
        hessian: torch.Tensor | None = None,
    ) -> SVDQWeights:
        return quantize_svdq(
            self.layer.weight,
            precision=self.precision,
            rank=rank,
            smooth=smooth,
            shift=self.layer.shift,
            scale_search=scale_search,
            num_iters=_MAX_FITS if in_turns else 1,
            judge=(lambda weights: self.error(weights, self._judged)) if in_turns else None,
            hessian=hessian,
        )

    def _smooth(self, *, published: bool = False) -> torch.Tensor:
        """The candidate with the least output error, given a branch of one fit; bf16 [K]."""

        def find() -> torch.Tensor:
            weight = self.layer.weight
            spans = InputSpans(weight.shape[1], self.layer.shift, weight.device)
            spans.update(self.layer.fit)
            tried = published_candidates(spans, [weight]) if published else candidates(spans)
            return min(tried, key=lambda smooth: self.error(self._svdq(smooth), self._judged)).bfloat16()

        return self._once("published smoothing" if published else "our smoothing", find)

    def _svdq_with_gptq(self, smooth: torch.Tensor, *, scale_search: bool = False) -> SVDQWeights:
        columns = smooth.numel()
        hessian = smooth.new_zeros(columns, columns, dtype=torch.float32)
        for part in (*self.layer.fit.split(_CHUNK), *self.layer.held_out.split(_CHUNK)):
            tokens = (part.float() + self.layer.shift) / smooth.float()
            hessian.addmm_(tokens.t(), tokens)
        hessian /= len(self.layer.fit) + len(self.layer.held_out)
        return self._svdq(smooth, in_turns=True, scale_search=scale_search, hessian=hessian)

    def _moments(self) -> InputMoments:
        def gather() -> InputMoments:
            moments = InputMoments(self._smooth(), self.layer.shift, self.arithmetic)
            moments.update(self.layer.fit)
            moments.update(self.layer.held_out, held_out=True)
            return moments

        return self._once("moments", gather)

    def _refined(self) -> Refined:
        def fit() -> Refined:
            return quantize_refined(
                self.layer.weight,
                None,
                self._moments(),
                precision=self.precision,
                rank=RANK,
                num_iters=_REFINED_ITERS,
            )

        return self._once("refined", fit)

    def fitted(
        self, *, descent: bool = True, regression: bool = True, awareness: bool = True, prior: float | None = None
    ) -> SVDQWeights:
        """`quantize_refined` with parts left out; with all of them, and the prior it chose, the same weights."""
        weight, smooth, dtype = self.layer.weight, self._smooth().float(), torch.bfloat16
        known = self._moments().covariances().with_prior(self._refined().prior if prior is None else prior, smooth)
        factor = damped_cholesky(known.quantized, _JITTER)

        def branch_of_weights(missed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            up, down = truncated_svd(missed, RANK)
            return up.to(dtype), (down / smooth).to(dtype)

        up, down = branch_of_weights(weight * smooth)
        residual: QuantizedResidual | None = None
        for iteration in range(_REFINED_ITERS):
            if iteration and residual is not None:
                if regression:
                    missed = weight @ known.input - residual.dequantize() @ known.input_quantized.t()
                    up, down = reduced_rank_regression(missed, known.input, RANK, dtype, None)
                else:
                    up, down = branch_of_weights(residual.subtracted_from(weight * smooth))
            if awareness:
                left = weight @ known.input_quantized - up.float() @ (down.float() @ known.input_quantized)
                target = torch.cholesky_solve(left.t(), factor).t().contiguous()
            else:
                target = (weight - up.float() @ down.float()) * smooth
            if residual is None or not descent:
                start = quantize_residual(target, self.precision, [len(weight)], dtype)
                residual = gptq(target, start, known.quantized, damping=_JITTER)
            if descent:
                residual = descend(target, residual, known.quantized)
        assert residual is not None
        offset = weight @ known.input_mean - residual.times(known.quantized_mean)
        offset -= up.float() @ (down.float() @ known.input_mean)
        return SVDQWeights(
            precision=self.precision,
            codes=residual.codes,
            scales=residual.scales,
            smooth=self._smooth(),
            smooth_orig=self._smooth(),
            proj_down=down,
            proj_up=up,
            bias=offset.to(dtype),
            wtscale=residual.wtscale,
        )
