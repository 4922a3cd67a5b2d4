"""Published layouts against the index formulas and worked examples of packing.md, and as round trips."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nunchaku_kernels import formats
from nunchaku_kernels.formats import SVDQWeights, e2m1

PROPERTY = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**32 - 1)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random bits of a dtype; floating values are finite normals so that equality means the same bits."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-8, 8, shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def grid(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.arange(rows).unsqueeze(1).expand(rows, columns), torch.arange(columns).expand(rows, columns)


# Flat positions, transcribed from packing.md; n is the row and k the column of the canonical tensor.


def qweight_nibble(n: Tensor, k: Tensor, width: int) -> Tensor:
    word = (n // 128 * (width // 64) + k // 64) * 8 + n % 128 // 16
    word = ((word * 8 + n % 8) * 4 + k % 32 // 8) * 4 + n % 16 // 8 * 2 + k % 64 // 32
    return word * 8 + k % 8


def wscales_position(n: Tensor, g: Tensor, width: int) -> Tensor:
    return (n // 128 * width + g) * 128 + n % 128 // 16 * 16 + n % 8 // 2 * 4 + n % 16 // 8 * 2 + n % 2


def micro_position(n: Tensor, g: Tensor, width: int) -> Tensor:
    return ((n // 128 * (width // 4) + g // 4) * 8 + n % 8) * 64 + n % 32 // 8 * 16 + n % 128 // 32 * 4 + g % 4


def lowrank_position(n: Tensor, k: Tensor, wide: Tensor, rank: Tensor, ranks: int) -> Tensor:
    tile = (wide // 16 * (ranks // 16) + rank // 16) * 32 + n % 8 * 4 + k % 8 // 2
    return tile * 8 + n % 16 // 8 * 4 + k % 16 // 8 * 2 + k % 2


def scattered(values: Tensor, positions: Tensor) -> Tensor:
    flat = torch.empty(values.numel(), dtype=values.dtype)
    flat[positions.reshape(-1)] = values.reshape(-1)
    return flat


@PROPERTY
@given(SEEDS, st.integers(1, 3), st.integers(1, 5))
def test_qweight_formula(seed: int, blocks: int, groups: int) -> None:
    codes = random_tensor((blocks * 128, groups * 64), torch.int8, seed)
    packed = formats.pack_qweight(codes)
    nibbles = scattered(codes, qweight_nibble(*grid(*codes.shape), codes.shape[1])) & 0xF
    assert torch.equal(packed.view(-1), nibbles[0::2] | (nibbles[1::2] << 4))
    assert packed.shape == (blocks * 128, groups * 32)
    assert torch.equal(formats.unpack_qweight(packed), codes)
    assert torch.equal(formats.unpack_qweight(packed, signed=False), codes & 0xF)
    assert torch.equal(formats.pack_qweight(codes & 0xF), packed)


@PROPERTY
@given(SEEDS, st.integers(1, 3), st.integers(1, 6))
def test_scale_formulas(seed: int, blocks: int, groups: int) -> None:
    scales = random_tensor((blocks * 128, groups), torch.bfloat16, seed)
    packed = formats.pack_wscales(scales)
    assert packed.shape == (groups, blocks * 128)
    assert torch.equal(packed.reshape(-1), scattered(scales, wscales_position(*grid(*scales.shape), groups)))
    assert torch.equal(formats.unpack_wscales(packed), scales)

    vector = scales[:, 0]
    assert torch.equal(formats.pack_vector(vector), formats.pack_wscales(vector.unsqueeze(1)).view(-1))
    assert torch.equal(formats.unpack_vector(formats.pack_vector(vector)), vector)

    micro = random_tensor((blocks * 128, groups * 4), torch.float32, seed).to(torch.float8_e4m3fn)
    packed = formats.pack_micro_scales(micro).view(torch.uint8)
    expected = scattered(micro.view(torch.uint8), micro_position(*grid(*micro.shape), groups * 4))
    assert torch.equal(packed.reshape(-1), expected)
    assert torch.equal(
        formats.unpack_micro_scales(packed.view(torch.float8_e4m3fn)).view(torch.uint8), micro.view(torch.uint8)
    )


@PROPERTY
@given(SEEDS, st.integers(1, 9), st.integers(0, 4))
def test_lowrank_formulas(seed: int, channels: int, ranks: int) -> None:
    channels, ranks = channels * 16, ranks * 16
    down = random_tensor((ranks, channels), torch.float16, seed)
    r, c = grid(ranks, channels)
    packed = formats.pack_lowrank_down(down)
    assert packed.shape == (channels, ranks)
    assert torch.equal(packed.reshape(-1), scattered(down, lowrank_position(r, c, c, r, ranks)))
    assert torch.equal(formats.unpack_lowrank_down(packed), down)

    up = random_tensor((channels, ranks), torch.float16, seed)
    c, r = grid(channels, ranks)
    packed = formats.pack_lowrank_up(up)
    assert torch.equal(packed.reshape(-1), scattered(up, lowrank_position(c, r, c, r, ranks)))
    assert torch.equal(formats.unpack_lowrank_up(packed), up)


@pytest.mark.parametrize(
    ("n", "k", "byte", "value"),
    [
        (0, 0, 0, 0x0D),
        (0, 1, 0, 0xD0),
        (0, 8, 16, 0x0D),
        (0, 32, 4, 0x0D),
        (1, 0, 64, 0x0D),
        (8, 0, 8, 0x0D),
        (16, 0, 512, 0x0D),
        (0, 64, 4096, 0x0D),
        (37, 77, 5458, 0xD0),
        (127, 127, 8191, 0xD0),
    ],
)
def test_qweight_examples(n: int, k: int, byte: int, value: int) -> None:
    codes = torch.zeros(128, 128, dtype=torch.int8)
    codes[n, k] = -3
    packed = formats.pack_qweight(codes).view(-1).view(torch.uint8)
    assert packed.nonzero().tolist() == [[byte]]
    assert packed[byte] == value


def test_vector_example() -> None:
    packed = formats.pack_vector(torch.arange(128.0)).tolist()
    assert packed[:18] == [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15, 16, 17]
    assert packed[-4:] == [118, 119, 126, 127]


@pytest.mark.parametrize(
    ("n", "k", "index", "value"),
    [
        (0, 0, 0, 0x0000000F),
        (0, 1, 0, 0x000F0000),
        (0, 8, 0, 0x000000F0),
        (0, 31, 3, 0xF0000000),
        (0, 32, 4, 0x0000000F),
        (1, 0, 8, 0x0000000F),
        (3, 63, 31, 0xF0000000),
    ],
)
def test_awq_examples(n: int, k: int, index: int, value: int) -> None:
    codes = torch.zeros(4, 64, dtype=torch.uint8)
    codes[n, k] = 15
    packed = formats.pack_awq(codes).view(-1)
    assert packed.nonzero().tolist() == [[index]]
    assert int(packed[index]) & 0xFFFFFFFF == value


@PROPERTY
@given(SEEDS, st.integers(1, 9), st.integers(1, 4))
def test_awq_round_trip(seed: int, quads: int, blocks: int) -> None:
    codes = (random_tensor((quads * 4, blocks * 64), torch.int8, seed) + 8).to(torch.uint8)
    packed = formats.pack_awq(codes)
    assert packed.shape == (quads, blocks * 32) and packed.dtype == torch.int32
    words = formats.pack_awq_int16(codes.to(torch.int8))
    assert words.shape == (quads, blocks * 64) and torch.equal(words.view(torch.int32), packed)
    assert torch.equal(formats.unpack_awq(packed), codes)
    assert torch.equal(formats.unpack_awq(words), codes)


@pytest.mark.parametrize(
    ("in_features", "group_size", "rows"),
    [(3072, 64, 48), (4096, 128, 32), (10240, 128, 80), (64, 64, 16), (256, 128, 8), (64, 32, 32)],
)
def test_awq_scale_padding(in_features: int, group_size: int, rows: int) -> None:
    scales = random_tensor((8, in_features // group_size), torch.float16, 1)
    packed = formats.pack_awq_scales(scales, group_size)
    assert packed.shape == (rows, 8) and not packed[scales.shape[1] :].any()
    assert torch.equal(formats.unpack_awq_scales(packed, in_features, group_size), scales)


@PROPERTY
@given(SEEDS, st.sampled_from([1, 2, 3, 6]), st.integers(1, 5))
def test_modulation_order(seed: int, chunks: int, channels: int) -> None:
    bias = random_tensor((chunks * channels,), torch.float32, seed)
    ordered = formats.to_channel_major(bias, chunks)
    assert torch.equal(ordered.view(channels, chunks).t(), bias.view(chunks, channels))
    assert torch.equal(formats.from_channel_major(ordered, chunks), bias)
    added = (formats.fold_unit_scale(bias, chunks) - bias).view(chunks, channels).round()
    ones = {chunk for chunk in range(chunks) if chunk in (1, chunks - 2)}
    assert [bool(row.all()) for row in added] == [chunk in ones for chunk in range(chunks)]
    restored = formats.unfold_unit_scale(formats.fold_unit_scale(bias, chunks), chunks)
    torch.testing.assert_close(restored, bias, atol=1e-6, rtol=0)


@PROPERTY
@given(SEEDS, st.integers(1, 2), st.integers(1, 4))
def test_w8a8_formula(seed: int, blocks: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (blocks * 128, groups * 64), generator=generator, dtype=torch.int8)
    n, k = grid(*weight.shape)
    word = ((n // 128 * (weight.shape[1] // 32) + k // 32) * 8 + n % 128 // 16) * 8 + n % 8
    word = (word * 4 + k % 16 // 4) * 4 + n % 16 // 8 * 2 + k % 32 // 16
    packed = formats.pack_w8a8(weight)
    assert torch.equal(packed.view(-1), scattered(weight, word * 4 + k % 4))
    assert torch.equal(formats.unpack_w8a8(packed), weight)


def random_weights(n: int, k: int, rank: int, precision: str, seed: int, *, optional: bool) -> SVDQWeights:
    group = 64 if precision == "int4" else 16
    codes = random_tensor((n, k), torch.int8, seed)
    scales = random_tensor((n, k // group), torch.bfloat16, seed).abs()
    vector = random_tensor((max(n, k),), torch.bfloat16, seed + 1)
    return SVDQWeights(
        precision=precision,  # type: ignore[arg-type]
        codes=codes if precision == "int4" else codes & 0xF,
        scales=scales if precision == "int4" else scales.to(torch.float8_e4m3fn),
        smooth=vector[:k],
        smooth_orig=vector[:k] * 2,
        proj_down=random_tensor((rank, k), torch.bfloat16, seed + 2),
        proj_up=random_tensor((n, rank), torch.bfloat16, seed + 3),
        bias=vector[:n] if optional else None,
        wtscale=vector[:1].float() if optional and precision == "nvfp4" else None,
        wcscales=vector[:n] if optional else None,
    )


@PROPERTY
@given(
    SEEDS, st.integers(1, 300), st.integers(1, 4), st.integers(0, 40), st.sampled_from(["int4", "nvfp4"]), st.booleans()
)
@example(0, 2240, 35, 32, "int4", True)
def test_svdq_round_trip(seed: int, n: int, groups: int, rank: int, precision: str, optional: bool) -> None:
    k = groups * (64 if precision == "int4" else 16)
    weights = random_weights(n, k, rank, precision, seed, optional=optional)
    tensors = formats.pack_svdq(weights)
    padded_n, padded_k, padded_rank = math.ceil(n / 128) * 128, math.ceil(k / 128) * 128, math.ceil(rank / 16) * 16
    assert tensors["qweight"].shape == (padded_n, padded_k // 2)
    assert tensors["wscales"].shape == (padded_k // weights.group_size, padded_n)
    assert tensors["proj_down"].shape == (padded_k, padded_rank)
    assert tensors["proj_up"].shape == (padded_n, padded_rank)
    assert tensors["smooth_factor"].shape == (padded_k,)

    padded = formats.unpack_svdq(tensors)
    assert not padded.codes[n:].any() and not padded.codes[:, k:].any()
    assert padded.bias is not None and (padded.bias[n:] == 1).all() and (padded.smooth[k:] == 1).all()

    cropped = formats.unpack_svdq(tensors, k, n)
    for name in ("codes", "smooth", "smooth_orig", "wtscale", "wcscales"):
        expected, actual = getattr(weights, name), getattr(cropped, name)
        assert (actual is None) if expected is None else torch.equal(actual, expected)
    assert torch.equal(cropped.scales.float(), weights.scales.float())
    assert torch.equal(cropped.proj_down[:rank], weights.proj_down)
    assert torch.equal(cropped.proj_up[:, :rank], weights.proj_up)
    expected_bias = torch.zeros_like(weights.smooth[:1]).expand(n) if weights.bias is None else weights.bias
    assert cropped.bias is not None and torch.equal(cropped.bias, expected_bias)


def test_non_contiguous_input() -> None:
    codes = random_tensor((128, 256), torch.int8, 3).t()
    assert torch.equal(formats.pack_qweight(codes), formats.pack_qweight(codes.contiguous()))
    packed = formats.pack_qweight(codes)
    strided = torch.stack((packed, packed), dim=-1)[..., 0]
    assert torch.equal(formats.unpack_qweight(strided), codes)


MIDPOINTS = [(a + b) / 2 for a, b in zip(e2m1.E2M1_MAGNITUDES[:-1], e2m1.E2M1_MAGNITUDES[1:], strict=True)]


@PROPERTY
@given(st.floats(-20, 20, width=32))
@example(0.25 - 2**-26)
@example(-(0.25 + 2**-25))
def test_e2m1_nearest(value: float) -> None:
    tensor = torch.tensor([value])
    clamped = max(-6.0, min(6.0, value))
    distance = min(abs(abs(clamped) - magnitude) for magnitude in e2m1.E2M1_MAGNITUDES)
    for encode in (e2m1.encode_nearest_even, e2m1.encode_ties_up):
        assert abs(e2m1.decode(encode(tensor)).item() - clamped) == distance


def test_e2m1_ties() -> None:
    ties = torch.tensor(MIDPOINTS)
    assert e2m1.encode_nearest_even(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert e2m1.encode_nearest_even(-ties).tolist() == [8, 10, 10, 12, 12, 14, 14]
    assert e2m1.encode_ties_up(ties).tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert e2m1.encode_ties_up(-ties).tolist() == [0, 9, 10, 11, 12, 13, 14]
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0])
    assert e2m1.encode_nearest_even(special).tolist() == [7, 15, 7, 0, 8]
    codes = torch.arange(16, dtype=torch.int8)
    assert torch.equal(e2m1.encode_nearest_even(e2m1.decode(codes)), codes)


@PROPERTY
@given(st.lists(st.floats(-20, 20, width=32) | st.sampled_from([*MIDPOINTS, *(-m for m in MIDPOINTS)]), min_size=1))
def test_e2m1_rounding_without_codes(values: list[float]) -> None:
    tensor = torch.tensor(values)
    expected = e2m1.decode(e2m1.encode_ties_up(tensor))
    assert torch.equal(e2m1.round_ties_up(tensor), expected)
    assert e2m1.round_ties_up(tensor, out=tensor) is tensor and torch.equal(tensor, expected)


def good_tensors() -> dict[str, Tensor]:
    return formats.pack_svdq(random_weights(128, 128, 16, "int4", 0, optional=True))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: formats.pack_qweight(torch.zeros(100, 64, dtype=torch.int8)), ValueError, "codes: expected N .* 100"),
        (lambda: formats.pack_qweight(torch.zeros(128, 32, dtype=torch.int8)), ValueError, "codes: expected K .* 32"),
        (lambda: formats.pack_qweight(torch.zeros(128, 64)), TypeError, "codes: expected dtype torch.int8"),
        (lambda: formats.pack_qweight(torch.full((128, 64), 16, dtype=torch.int8)), ValueError, "codes: .*16..16"),
        (lambda: formats.unpack_qweight(torch.zeros(128, dtype=torch.int8)), ValueError, "qweight: expected shape"),
        (lambda: formats.pack_wscales(torch.zeros(64, 2)), ValueError, "scales: expected N"),
        (lambda: formats.pack_micro_scales(torch.zeros(128, 4)), TypeError, "scales: expected dtype"),
        (lambda: formats.pack_lowrank_down(torch.zeros(8, 16)), ValueError, "down: expected R"),
        (lambda: formats.pack_lowrank_up(torch.zeros(8, 16)), ValueError, "up: expected N"),
        (lambda: formats.pack_awq(torch.full((4, 64), 16, dtype=torch.uint8)), ValueError, "codes: expected values"),
        (lambda: formats.pack_awq_scales(torch.zeros(4, 1), 48), ValueError, "group_size"),
        (lambda: formats.unpack_awq_scales(torch.zeros(1, 4), 128, 64), ValueError, "wscales: expected at least 2"),
        (lambda: formats.to_channel_major(torch.zeros(7), 3), ValueError, "rows: .* 3 chunks"),
        (lambda: formats.unpack_svdq({}), ValueError, "missing qweight"),
        (lambda: formats.unpack_svdq(good_tensors(), in_features=300), ValueError, "in_features: .* 128, got 300"),
        (lambda: formats.unpack_svdq(good_tensors() | {"bias": torch.zeros(256)}), TypeError, "bias"),
        (lambda: e2m1.decode(torch.tensor([16], dtype=torch.int8)), ValueError, "codes: expected values in 0..15"),
    ],
)
def test_wrong_arguments(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 6}, "bits: expected 4 or 8, got 6"), ({"codes": torch.zeros(4, 128)}, "codes: expected dtype"),
        ({"scales": torch.ones(3, 2)}, "scales: expected shape"), ({"scales": torch.ones(4, 0)}, "scales: expected G"),
        ({"scales": torch.ones(4, 3)}, "codes: expected K"), ({"zeros": torch.zeros(4, 1)}, "zeros: expected shape"),
        ({"zeros": torch.zeros(4, 2).half()}, "zeros: expected dtype"), ({"proj_up": None}, "expected both or neither"),
        ({"proj_down": torch.ones(3, 64)}, "proj_down: expected shape"), ({"proj_up": torch.ones(4, 2)}, "proj_up"),
    ],
)  # fmt: skip
def test_weight_only_weights_are_checked(change: dict[str, object], message: str) -> None:
    parts = {
        "codes": torch.zeros(4, 128, dtype=torch.uint8), "scales": torch.ones(4, 2), "zeros": torch.zeros(4, 2),
        "proj_down": torch.ones(3, 128), "proj_up": torch.ones(4, 3),
    }  # fmt: skip
    form = formats.W4A16Weights(**parts)
    assert form.group_size == 64 and form.rank == 3 and formats.pack_w4a16(form)["proj_up"].shape == (4, 3)
    with pytest.raises((ValueError, TypeError), match=message):
        formats.W4A16Weights(**(parts | change))


def test_codes_beyond_four_bits_are_refused() -> None:
    form = formats.W4A16Weights(torch.full((4, 64), 16, dtype=torch.uint8), torch.ones(4, 1), torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"codes: expected values in 0\.\.15"):
        formats.pack_w4a16(form)
    with pytest.raises(TypeError, match="container"):
        formats.pack_w4a16(form, torch.int8)
