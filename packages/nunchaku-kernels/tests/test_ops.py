"""Operators: registered as torch expects, equal with and without the compiled kernels, and impossible to crash."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nunchaku_kernels import reference
from nunchaku_kernels.formats import SVDQWeights, pack_awq, pack_awq_int16, pack_awq_scales, pack_svdq
from nunchaku_kernels.ops import ARITHMETICS, SCHEMAS, _native, check_arithmetic, default_arithmetic

OPS = torch.ops.nunchaku_kernels
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float32: 2**-18, torch.float16: 2**-10, torch.bfloat16: 2**-7}
RandomWeights = Callable[..., SVDQWeights]
Call = tuple[tuple[Any, ...], dict[str, Any]]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def w4a16_call(tokens: int, k: int, n: int, group_size: int, dtype: torch.dtype, container: torch.dtype) -> Call:
    codes = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    qweight = pack_awq(codes) if container == torch.int32 else pack_awq_int16(codes)
    scales, zeros = randn(n, k // group_size, dtype=dtype, seed=1), randn(n, k // group_size, dtype=dtype, seed=2)
    packed = (pack_awq_scales(scales, group_size), pack_awq_scales(zeros, group_size))
    return (randn(tokens, k, dtype=dtype), qweight, *packed, randn(n, dtype=dtype), group_size), {}


def every_call(
    random_weights: RandomWeights, tokens: int = 6, n: int = 256, rank: int = 32, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Call]:
    """One valid call of every operator."""
    calls: dict[str, Call] = {"w4a16_linear": w4a16_call(tokens, 128, 12, 64, torch.float16, torch.int32)}
    tail = {
        "out_features": n - 5,
        "activation": "gelu",
        "gate": randn(2, n - 5),
        "residual": randn(tokens, n - 5),
        "out_dtype": dtype,
    }
    streams = [[randn(3, size, 20, dtype=dtype, seed=i + size) for size in (tokens, 2)] for i in range(3)]
    calls["relative_l1"] = ((*streams, torch.tensor([2, 1, 2])), {})
    x = randn(tokens, 250, dtype=dtype)
    for precision in ("int4", "nvfp4"):
        p = pack_svdq(random_weights(n, 256, precision=precision, rank=rank, factors=True))
        low_rank = (p["proj_up"], torch.linspace(0, 1, rank), p["wcscales"], p["bias"])
        smooth, down = p["smooth_factor"], p["proj_down"]
        if precision == "int4":
            calls["w4a8_fold_scales"] = ((p["qweight"], p["wscales"]), {})
            calls["w4a8_quantize"] = ((x, smooth, 0.25, down), {})
            folded, q = OPS.w4a8_fold_scales(p["qweight"], p["wscales"]), OPS.w4a8_quantize(x, smooth, 0.25, down)
            calls["w4a8_linear"] = ((*q, p["qweight"], *folded, *low_rank), tail)
            heads = pack_svdq(random_weights(384, 256, rank=rank, factors=True))
            branch = (heads["proj_up"], torch.linspace(0, 1, rank), heads["wcscales"], heads["bias"])
            norms, rotary = (randn(128, dtype=dtype, seed=5), randn(128, dtype=dtype, seed=6)), randn(tokens, 64, 2)
            calls["w4a8_linear_heads"] = (
                (*q, heads["qweight"], *OPS.w4a8_fold_scales(heads["qweight"], heads["wscales"]), *branch, *norms,
                 1e-6, rotary.float(), torch.zeros(3, 1, 1, tokens + 3, 128, dtype=dtype), 2), {},
            )  # fmt: skip
            modulation = (randn(2, 250, dtype=dtype, seed=3), randn(2, 250, dtype=dtype, seed=4))
            calls["w4a8_quantize_norm"] = ((x, *modulation, 1e-6, smooth, down), {})
            calls["w4a4_quantize"] = ((x, smooth, 0.25, down, False), {})
            q = OPS.w4a4_quantize(x, smooth, 0.25, down)
            calls["w4a4_linear"] = ((*q, p["qweight"], p["wscales"], *low_rank), tail)
        else:
            calls["nvfp4_quantize"] = ((x, smooth, 0.0, down), {})
            q = OPS.nvfp4_quantize(x, smooth, 0.0, down)
            calls["nvfp4_linear"] = ((*q, p["qweight"], p["wscales"], p["wtscale"], *low_rank), tail)
            weight = (p["qweight"], p["wscales"], p["wtscale"])
            calls["svdq_w4a16_linear"] = ((x, smooth, 0.0, down, *weight, *low_rank), tail)
    return calls


def bare(calls: dict[str, Call]) -> dict[str, Call]:
    """The same calls with everything optional left out."""
    reduced = {}
    for name, (arguments, keywords) in calls.items():
        if name == "w4a8_quantize_norm":
            reduced[name] = ((randn(6, 256), randn(1, 256), randn(1, 256), 1e-6, None, None), {})
        elif name.endswith("_quantize"):
            reduced[name] = ((randn(6, 256, dtype=torch.float32), None, 0.0, None), {})
        elif name == "w4a8_linear_heads":
            out = torch.zeros(3, 2, 1, 3, 128)
            head = (*arguments[:2], torch.empty(6, 0), *arguments[3:6])
            reduced[name] = ((*head, None, None, None, None, None, None, 1e-6, None, out, 0), {})
        elif "out_features" in keywords:
            shape = {"out_features": keywords["out_features"], "out_dtype": torch.float32}
            head = list(arguments[:-4])
            if name == "svdq_w4a16_linear":
                head = [randn(6, 256, dtype=torch.float32), None, 0.0, None, *head[4:-1], None]
            else:
                head[2] = torch.empty(6, 0)
                if name == "nvfp4_linear":
                    head[-1] = None
            reduced[name] = ((*head, None, None, None, None), shape)
        elif name == "w4a16_linear":
            reduced[name] = ((*arguments[:4], None, 64), {})
        elif name == "relative_l1":
            reduced[name] = (arguments[:2], {})
        else:
            reduced[name] = (arguments, keywords)
    return reduced


def test_every_operator_is_registered_and_called_here(random_weights: RandomWeights) -> None:
    assert every_call(random_weights).keys() == SCHEMAS.keys()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("minimal", [True, False])
@pytest.mark.parametrize("tokens", [0, 6])
def test_operators_are_what_their_schemas_and_fakes_say(
    random_weights: RandomWeights, monkeypatch: pytest.MonkeyPatch, native: bool, minimal: bool, tokens: int
) -> None:
    calls = every_call(random_weights, tokens)
    if minimal and tokens:
        calls = bare(calls)
    if not native:
        monkeypatch.setattr(_native, "extension", lambda: None)
    for name, (arguments, keywords) in calls.items():
        checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        if "nvfp4" in name or any(getattr(value, "dtype", None) == torch.float8_e4m3fn for value in arguments):
            checks = ["test_autograd_registration", "test_faketensor"]  # the others do arithmetic on float8
        torch.library.opcheck(getattr(OPS, name).default, arguments, keywords, test_utils=checks)


def outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_results_do_not_depend_on_the_extension(
    random_weights: RandomWeights, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    if _native.extension() is None:
        pytest.skip("the extension was not built")
    tokens, rank = data.draw(st.sampled_from([0, 1, 2, 7, 32])) * 2, data.draw(st.sampled_from([0, 16, 48]))
    dtype = data.draw(st.sampled_from(DTYPES))
    calls = every_call(random_weights, tokens, 128 * data.draw(st.integers(1, 3)), rank, dtype)
    container = data.draw(st.sampled_from([torch.int32, torch.int16]))
    calls["w4a16_linear"] = w4a16_call(tokens, 384, data.draw(st.integers(1, 20)) * 4, 128, dtype, container)
    for name in ("w4a8_fold_scales", "w4a8_quantize", "w4a8_linear", "w4a16_linear"):
        arguments, keywords = calls[name]
        with monkeypatch.context() as patch:
            patch.setattr(_native, "extension", lambda: None)
            expected = outputs(getattr(OPS, name)(*arguments, **keywords))
        for one, other in zip(outputs(getattr(OPS, name)(*arguments, **keywords)), expected, strict=True):
            assert one.dtype == other.dtype
            if one.dtype in (torch.int8, torch.int16):
                assert torch.equal(one, other)
            atol = ROUNDING[one.dtype] * float(other.abs().amax()) if other.numel() and one.is_floating_point() else 0
            torch.testing.assert_close(one, other, rtol=ROUNDING.get(one.dtype, 0), atol=atol)
        if name == "w4a8_quantize":
            assert torch.equal(getattr(OPS, name)(*arguments)[1], expected[1])


@given(tokens=st.integers(1, 40), groups=st.integers(1, 3), seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_w4a8_sums_are_exact_integers(random_weights: RandomWeights, tokens: int, groups: int, seed: int) -> None:
    weights = random_weights(256, 128 * groups, seed=seed)
    p = pack_svdq(weights)
    rows, multipliers = OPS.w4a8_fold_scales(p["qweight"], p["wscales"])
    expected = reference.w4a8.fold_scales(weights.codes, weights.scales)
    assert torch.equal(rows, expected[0])
    assert torch.equal(multipliers, expected[1])
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (tokens, 128 * groups), generator=generator, dtype=torch.int8)
    one = torch.ones(tokens), torch.empty(tokens, 0), p["qweight"], torch.ones(256), multipliers
    y = OPS.w4a8_linear(codes, *one, None, None, None, None, out_features=256, out_dtype=torch.float32)
    sums = reference.w4a8.accumulate(codes, reference.w4a8.decode_int8(weights.codes, multipliers))
    assert torch.equal(y, sums.float())  # below 2^24, so fp32 holds them exactly


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_w4a16_is_its_reference(data: st.DataObject) -> None:
    group_size, dtype = data.draw(st.sampled_from([64, 128])), data.draw(st.sampled_from(DTYPES[1:]))
    k, n = group_size * data.draw(st.integers(1, 4)), 4 * data.draw(st.integers(1, 20))
    container = data.draw(st.sampled_from([torch.int32, torch.int16]))
    (_, qweight, wscales, wzeros, bias, _), _ = w4a16_call(1, k, n, group_size, dtype, container)
    x = randn(data.draw(st.integers(0, 9)), k, dtype=data.draw(st.sampled_from(DTYPES)))
    codes = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    groups = k // group_size
    expected = reference.w4a16.linear(x, codes, wscales[:groups].t(), wzeros[:groups].t(), bias)
    y = OPS.w4a16_linear(x, qweight, wscales, wzeros, bias, group_size)
    atol = ROUNDING[x.dtype] * float(expected.abs().amax()) if y.numel() else 0.0
    torch.testing.assert_close(y, expected, rtol=ROUNDING[x.dtype], atol=atol)


# ---- wrong calls: an error, never a crash ----------------------------------------------------------------------------


def mutations(tensor: torch.Tensor) -> st.SearchStrategy[torch.Tensor]:
    """Tensors of other shapes, dtypes, layouts and values, some of them valid in place of `tensor`."""
    sizes = st.sampled_from([0, 1, 2, 3, 15, 16, 63, 64, 65, 96, 127, 128, 129, 256, 384])
    shapes = st.lists(sizes, min_size=0, max_size=3)
    dtypes = st.sampled_from(
        [*DTYPES, torch.float64, torch.int8, torch.int16, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn,
         torch.complex64]
    )  # fmt: skip
    views: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t[:0],
        lambda t: t[..., :0],
        lambda t: t[1:],
        lambda t: t[..., :-1],
        lambda t: t.unsqueeze(0),
        lambda t: t.flatten(),
        lambda t: t.mT if t.dim() > 1 else t,
        lambda t: t.flatten()[:1].expand(t.shape) if t.numel() else t,
        lambda t: torch.cat([t, t]),
        lambda t: torch.cat([t, t], dim=-1),
        lambda t: t.to_sparse() if t.dtype in DTYPES else t,
        lambda t: t.new_full(t.shape, 127) if t.dtype in (torch.int8, torch.int16) else t,
        lambda t: t.new_full(t.shape, float("nan")) if t.dtype in DTYPES else t,
    ]
    return (
        st.builds(lambda shape, dtype: torch.zeros(shape).to(dtype), shapes, dtypes)
        | st.sampled_from(views).map(lambda view: view(tensor))
        | dtypes.map(tensor.to)
    )


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", SCHEMAS)
@given(data=st.data())
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_arguments_never_crash(
    random_weights: RandomWeights, monkeypatch: pytest.MonkeyPatch, name: str, native: bool, data: st.DataObject
) -> None:
    arguments, keywords = every_call(random_weights)[name]
    call = dict(enumerate(arguments)) | keywords
    for key in data.draw(st.lists(st.sampled_from(list(call)), min_size=1, max_size=2, unique=True)):
        value = call[key]
        if isinstance(value, torch.Tensor):
            call[key] = data.draw(st.none() | mutations(value))
        elif isinstance(value, bool):
            call[key] = not value
        elif isinstance(value, int):
            call[key] = data.draw(st.sampled_from([-(2**40), -1, 0, 1, 64, 127, 128, 256, 300, 2**40]))
        elif isinstance(value, float):
            call[key] = data.draw(st.sampled_from([float("nan"), float("inf"), -1.0, 1e300]))
        elif isinstance(value, str):
            call[key] = data.draw(st.sampled_from(["", "none", "silu", "relu"]))
        elif value is not None:
            call[key] = data.draw(st.sampled_from([*DTYPES, torch.int8, torch.float64]))
    positional = [value for key, value in call.items() if isinstance(key, int)]
    named = {key: value for key, value in call.items() if isinstance(key, str)}
    if not native:
        monkeypatch.setattr(_native, "extension", lambda: None)
    try:
        result = getattr(OPS, name)(*positional, **named)
    except (ValueError, TypeError) as error:
        assert name in str(error)
        assert "`" in str(error) or "wscales" in str(error)
    except RuntimeError as error:
        # torch's own parser, before any code of ours: an absent tensor that is not optional
        assert "Expected a value of type" in str(error)
        assert name in str(error)
    else:
        assert result is None or all(tensor.layout == torch.strided for tensor in outputs(result))


@given(
    samples=st.integers(1, 3),
    tokens=st.integers(1, 9),
    heads=st.integers(1, 3),
    before=st.integers(0, 4),
    after=st.integers(0, 4),
    normed=st.booleans(),
    rotated=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_linear_heads_are_the_linear_split(
    random_weights: RandomWeights,
    samples: int,
    tokens: int,
    heads: int,
    before: int,
    after: int,
    normed: bool,
    rotated: bool,
    dtype: torch.dtype,
) -> None:
    """Against the formulas in fp64, token by token; what lies beside the tokens stays as it was."""
    n = 384 * heads
    p = pack_svdq(random_weights(n, 128))
    q = OPS.w4a8_quantize(randn(samples * tokens, 128), p["smooth_factor"], 0.0, p["proj_down"])
    weight = (*q, p["qweight"], *OPS.w4a8_fold_scales(p["qweight"], p["wscales"]), p["proj_up"], None, None, p["bias"])
    norms = [randn(128, seed=seed).float() if normed else None for seed in (1, 2)]
    angles = randn(tokens, 64, seed=3).double()
    rotary = torch.stack((angles.cos(), angles.sin()), -1).float() if rotated else None
    out = torch.full((3, samples, heads, before + tokens + after, 128), 7.0, dtype=dtype)
    OPS.w4a8_linear_heads(*weight, *norms, 1e-6, rotary, out, before)
    y = OPS.w4a8_linear(*weight, out_features=n, out_dtype=dtype).double().view(samples, tokens, 3, heads, 128)
    for part, norm in enumerate([*norms, None]):
        expected = y[:, :, part]
        if norm is not None:
            expected = expected / (expected.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()
        if rotated and part < 2:
            turned = torch.view_as_complex(expected.unflatten(-1, (64, 2)).contiguous())
            turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
            expected = torch.view_as_real(turned).flatten(-2)
        given = out[part, :, :, before : before + tokens].transpose(1, 2).double()
        torch.testing.assert_close(given, expected, rtol=ROUNDING[dtype], atol=2e-6 * float(expected.abs().max()))
    assert (out[:, :, :, :before] == 7).all()
    assert (out[:, :, :, before + tokens :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantising_behind_a_norm_is_quantising_the_modulated_value(
    random_weights: RandomWeights, dtype: torch.dtype
) -> None:
    (x, scale, shift, eps, smooth, down), _ = every_call(random_weights, dtype=dtype)["w4a8_quantize_norm"]
    rows = torch.arange(6) // 3  # two rows of modulation for six tokens
    value = x.double()
    value = (value - value.mean(1, keepdim=True)) / (value.var(1, correction=0, keepdim=True) + eps).sqrt()
    value = (value * (1 + scale.double()[rows]) + shift.double()[rows]).to(dtype)
    codes, ascales, lora_act = OPS.w4a8_quantize_norm(x, scale, shift, eps, smooth, down)
    expected_codes, expected_ascales, expected_lora_act = OPS.w4a8_quantize(value, smooth, 0.0, down)
    assert (codes.int() - expected_codes.int()).abs().max() <= 1
    rounding = ROUNDING[dtype]
    torch.testing.assert_close(ascales, expected_ascales, rtol=rounding, atol=0)
    torch.testing.assert_close(
        lora_act, expected_lora_act, rtol=rounding, atol=rounding * float(expected_lora_act.abs().amax())
    )
    with pytest.raises(ValueError, match=r"w4a8_quantize_norm: `scale` has 4 rows.*6 tokens"):
        OPS.w4a8_quantize_norm(x, scale.repeat(2, 1), shift.repeat(2, 1), eps, smooth, down)


@pytest.mark.parametrize("native", [True, False])
def test_sums_that_could_overflow_are_refused(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    k = 133_120
    qweight = torch.zeros(128, k // 2, dtype=torch.int8)
    codes, multipliers = torch.zeros(1, k, dtype=torch.int8), torch.zeros(128, k // 64, dtype=torch.int16)
    head = codes, torch.ones(1), torch.empty(1, 0), qweight, torch.ones(128), multipliers
    if not native:
        monkeypatch.setattr(_native, "extension", lambda: None)
    with pytest.raises(ValueError, match=r"w4a8_linear: `codes`.*133000.*133120"):
        OPS.w4a8_linear(*head, None, None, None, None, out_features=128, out_dtype=torch.float32)


def test_instruction_sets(random_weights: RandomWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _native.extension()
    if module is None:
        pytest.skip("the extension was not built")
    calls = every_call(random_weights)
    names = ("w4a8_quantize", "w4a8_linear", "w4a16_linear")
    results = {}
    for isa in module.isas():
        monkeypatch.setenv(_native.ISA_VARIABLE, isa)
        results[isa] = [getattr(OPS, name)(*calls[name][0], **calls[name][1]) for name in names]
    for codes, _, _ in (result[0] for result in results.values()):
        assert torch.equal(codes, results["portable"][0][0])
    monkeypatch.setenv(_native.ISA_VARIABLE, "bogus")
    for name in names:
        with pytest.raises(ValueError, match=r"NUNCHAKU_CPU_ISA='bogus'.*portable"):
            getattr(OPS, name)(*calls[name][0], **calls[name][1])


def test_arithmetics() -> None:
    for precision, possible in ARITHMETICS.items():
        for device in ("cpu", "meta", "cuda", "mps"):
            assert default_arithmetic(precision, torch.device(device)) in possible
        for arithmetic in possible:
            check_arithmetic("layer", precision, arithmetic)
    with pytest.raises(ValueError, match=r"layer: nvfp4 weights.*'w4a8'; possible: nvfp4, w4a16"):
        check_arithmetic("layer", "nvfp4", "w4a8")
    with pytest.raises(ValueError, match=r"'w2a2' \(unknown\)"):
        check_arithmetic("layer", "int4", "w2a2")


def test_thread_counts_follow_the_work() -> None:
    assert _native.threads(0) == 1
    assert 1 <= _native.threads(1 << 40) <= torch.get_num_threads()
