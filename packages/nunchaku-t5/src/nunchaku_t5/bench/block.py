"""One block of a T5 encoder, with random weights, as a model of transformers runs it."""

import copy
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import T5Config, T5EncoderModel

from nunchaku_kernels.bench.linear import ROTATED_BYTES
from nunchaku_kernels.bench.report import Row
from nunchaku_kernels.bench.timing import interleaved_medians
from nunchaku_t5.architecture import skeleton
from nunchaku_t5.layers import stored_bytes
from nunchaku_t5.quantize import plan, quantize_encoder

TOKENS = (16, 77, 128, 256, 512)
SIZES = {
    "xxl": {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 24},
    "xl": {"d_model": 2048, "d_ff": 5120, "num_heads": 32, "num_layers": 24},
    "large": {"d_model": 1024, "d_ff": 2816, "num_heads": 16, "num_layers": 24},
}
"""T5 v1.1."""
VOCABULARY = 32128
BASELINE = "torch-bf16"

Step = Callable[[str], None]


def t5_config(size: str, **changes: Any) -> T5Config:
    """The config of a T5 v1.1 of a size, with changes."""
    shape = {"vocab_size": VOCABULARY, "d_kv": 64, "feed_forward_proj": "gated-gelu", **SIZES[size], **changes}
    return T5Config(**shape)


def bench_t5(
    tokens: Iterable[int] = TOKENS,
    *,
    size: str = "xxl",
    seconds: float = 2.0,
    clock: Callable[[], float] = time.perf_counter,
    device: str = "cpu",
    on_step: Step = lambda _: None,
) -> Iterator[Row]:
    """Time a block in 4 bits, in 16 bits and, where bitsandbytes is installed, in NF4, in one process, taking turns.

    Args:
        tokens: lengths of the one text that is encoded.
        size: one of `SIZES`.
        seconds: measuring time per length.
        clock: see `interleaved_medians`.
        device: torch device.
        on_step: told what comes next.

    Yields:
        Bytes of a block and of the whole encoder's file, then the times.

    Raises:
        ValueError: an unknown size, or no tokens.
    """
    lengths = list(tokens)
    if size not in SIZES or not lengths or min(lengths) < 1:
        raise ValueError(f"`size` must be one of {', '.join(SIZES)}, `tokens` at least 1; got {size!r}, {lengths}")
    place = torch.device(device)
    on_step("making blocks")
    rivals = {BASELINE: _block(size, place), "w4a16": _block(size, place)}
    quantize_encoder(rivals["w4a16"])
    if importlib.util.find_spec("bitsandbytes") is not None:
        rivals["nf4"] = _nf4(_block(size, place))
    sizes = {name: _nbytes(model.encoder.block) for name, model in rivals.items()}
    for name, nbytes in sizes.items():
        baseline = None if name == BASELINE else BASELINE
        ratio = None if name == BASELINE else sizes[BASELINE] / nbytes
        yield Row(f"t5/{name}/{size}-block/bytes", nbytes / 1e6, "MB", baseline, ratio)
    whole, quantized = encoder_bytes(size)
    yield Row(f"t5/{BASELINE}/{size}/bytes", whole / 1e9, "GB")
    yield Row(f"t5/w4a16/{size}/bytes", quantized / 1e9, "GB", BASELINE, whole / quantized)

    copies = {name: [model, *_copies(model, sizes[name])] for name, model in rivals.items()}
    for length in lengths:
        on_step(f"{length} tokens")
        x = torch.randn(1, length, SIZES[size]["d_model"], device=place).bfloat16()
        calls = {name: [partial(_encode, model, x) for model in models] for name, models in copies.items()}
        medians = interleaved_medians(calls, seconds=seconds, clock=clock)
        for name, median in medians.items():
            baseline = None if name == BASELINE else BASELINE
            ratio = None if name == BASELINE else medians[BASELINE] / median
            yield Row(f"t5/{name}/{size}-block/m{length}", median * 1e3, "ms", baseline, ratio)


def encoder_bytes(size: str, *, group_size: int = 128, embedding_bits: int = 16) -> tuple[int, int]:
    """Bytes of all tensors of a T5 v1.1 encoder, embeddings once: in 16 bits, and quantised.

    Args:
        size: one of `SIZES`.
        group_size, embedding_bits: see `quantize.plan`.
    """
    model = skeleton(t5_config(size), size)
    layers, _ = plan(model, group_size=group_size, embedding_bits=embedding_bits)
    before = after = 0
    for path, module in model.named_modules():
        if path == "encoder.embed_tokens":  # tied
            continue
        own = 2 * sum(value.numel() for value in module.parameters(recurse=False))
        before += own
        after += stored_bytes(module, layers[path]) if path in layers else own
    return before, after


def _block(size: str, device: torch.device) -> Any:
    """A model of one block, in bfloat16, of normal weights."""
    with torch.device("meta"):
        model = T5EncoderModel(t5_config(size, num_layers=1, vocab_size=8)).bfloat16()
    model = model.to_empty(device=device).eval()
    model.tie_weights()
    with torch.no_grad():
        for value in model.parameters():
            # a bf16 matrix is made from a shorter run of numbers: a normal one takes longer to make than to measure
            run = torch.randn(min(value.numel(), 1 << 20), device=device) * (value.shape[-1] ** -0.5)
            value.copy_(run.repeat(-(-value.numel() // run.numel()))[: value.numel()].view(value.shape))
    return model


def _nf4(model: Any) -> Any:
    """Its linears in bitsandbytes' NF4, blocks of 64, as transformers makes them."""
    import bitsandbytes as bnb

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                linear = bnb.nn.Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                linear.weight = bnb.nn.Params4bit(
                    child.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=False
                )
                setattr(module, name, linear.to(child.weight.device))
    return model


def _nbytes(module: nn.Module) -> int:
    total = 0
    for value in module.parameters():
        total += value.nbytes
        state = getattr(value, "quant_state", None)  # scales of NF4 are no parameters
        if state is not None:
            total += sum(part.nbytes for part in (state.absmax, state.code))
    return total


def _copies(model: Any, nbytes: int) -> list[Any]:
    """Further copies, so that no rival finds its weights in a cache."""
    return [copy.deepcopy(model) for _ in range(max(2, -(-ROTATED_BYTES // nbytes)) - 1)]


@torch.no_grad()
def _encode(model: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = model(inputs_embeds=x).last_hidden_state
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return result
