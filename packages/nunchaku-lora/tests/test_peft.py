"""PEFT and diffusers on 4-bit layers: the usual calls do the usual thing, and an adapter acts exactly once."""

import copy
import gc
import random
import warnings
from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

import nunchaku_lora
from nunchaku_kernels.nn import QuantizedLinear, is_fused
from nunchaku_lora.peft_layer import QuantizedLoraLinear

Make = Callable[..., Any]
Run = Callable[..., torch.Tensor]
EVERYTHING = [
    "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out", "net.0.proj", "net.2",
    "norm1.linear", "norm1_context.linear", "norm.linear", "proj_mlp", "proj_out", "x_embedder", "context_embedder",
]  # fmt: skip
examples = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def config(targets: list[str] | None = None, r: int = 4, alpha: float = 6, **kwargs: Any) -> LoraConfig:
    kwargs = {"init_lora_weights": False} | kwargs
    return LoraConfig(r=r, lora_alpha=alpha, target_modules=targets or EVERYTHING, **kwargs)


def lora_layers(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


def explicit(model: Any, strengths: dict[str, float]) -> dict[str, torch.Tensor]:
    """What adapters add to the weight of each linear, in float64."""
    found: dict[str, torch.Tensor] = {}
    for path, layer in lora_layers(model).items():
        for name, strength in strengths.items():
            if name in layer.lora_A:
                down, up = layer.lora_A[name].weight.detach().double(), layer.lora_B[name].weight.detach().double()
                delta = strength * layer.lora_alpha[name] / layer.r[name] * up @ down
                found[path] = found[path] + delta if path in found else delta
    return found


def bare_weights(model: Any, weight_of: Any) -> dict[str, torch.Tensor]:
    return {
        path: weight_of(module, module.in_features)
        for path, module in model.named_modules()
        if hasattr(module, "in_features") and "lora_" not in path and not isinstance(module, QuantizedLoraLinear)
    }


def check_weights(model: Any, bare: dict[str, torch.Tensor], strengths: dict[str, float], weight_of: Any) -> None:
    """Every linear computes its weight plus exactly what the adapters say."""
    deltas = explicit(model, strengths)
    assert deltas
    for path, delta in deltas.items():
        expected = bare[path] + delta
        given = weight_of(model.get_submodule(path), delta.shape[1])
        assert float((given - expected).norm() / expected.norm()) < 1e-5, path


def test_enabling_is_idempotent_and_undone(make_model: Make) -> None:
    nunchaku_lora.enable()
    assert nunchaku_lora.is_enabled()
    nunchaku_lora.disable()
    assert not nunchaku_lora.is_enabled()
    originals = peft.tuners.lora.model.dispatch_default, peft.tuners.lora.layer.dispatch_default
    assert originals[0] is originals[1]
    with pytest.raises(ValueError, match=r"is not supported"):
        inject_adapter_in_model(config(["to_q"]), make_model())
    nunchaku_lora.enable()
    assert len(lora_layers(inject_adapter_in_model(config(["to_q"]), make_model()))) == 2


def test_models_without_quantised_layers_are_peft_s_own() -> None:
    model = inject_adapter_in_model(config(["0"]), nn.Sequential(nn.Linear(8, 8)))
    assert type(model[0]) is peft.tuners.lora.layer.Linear


@given(data=st.data())
@examples
def test_every_layer_computes_its_weight_and_the_adapters(
    make_model: Make, weight_of: Any, data: st.DataObject
) -> None:
    model = make_model()
    bare = bare_weights(model, weight_of)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = ["a", "b", "c"][: data.draw(st.integers(1, 3))]
    for i, name in enumerate(names):
        targets = data.draw(st.lists(st.sampled_from(EVERYTHING), min_size=1, max_size=9, unique=True))
        torch.manual_seed(i)
        inject_adapter_in_model(config(targets, r=data.draw(st.integers(1, 20)), alpha=3), model, name)
    active = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    strengths = {name: data.draw(st.sampled_from([-1.0, 0.0, 0.3, 1.0, 2.0])) for name in active}
    for layer in lora_layers(model).values():
        layer.set_adapter(active)
        for name, strength in strengths.items():
            layer.set_scale(name, strength)
    if any(name in layer.lora_A for layer in lora_layers(model).values() for name in active):
        check_weights(model, bare, strengths, weight_of)
    for name in names:
        for layer in lora_layers(model).values():
            with warnings.catch_warnings(action="ignore"):
                layer.delete_adapter(name)
    for path, layer in lora_layers(model).items():
        model.set_submodule(path, layer.get_base_layer())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    for path, weight in bare.items():
        assert torch.equal(weight_of(model.get_submodule(path), weight.shape[1]), weight)


def test_an_adapter_acts_once_whichever_path_runs(make_model: Make, weight_of: Any) -> None:
    model = make_model()
    attn = model.transformer_blocks[0].attn
    bare = weight_of(attn.to_qkv, 128)
    inject_adapter_in_model(config(["to_q", "to_v"], lora_dropout=0.5), model)
    model.eval()
    deltas = explicit(model, {"default": 1.0})
    expected = bare.clone()
    expected[:128] += deltas["transformer_blocks.0.attn.to_q"]
    expected[256:] += deltas["transformer_blocks.0.attn.to_v"]
    parts = [attn.to_q, attn.to_k, attn.to_v]
    assert all(map(is_fused, parts))
    by_slices = torch.cat([weight_of(part, 128) for part in parts])
    by_bare_slices = torch.cat([weight_of(getattr(part, "base_layer", part), 128) for part in parts])
    for path in (weight_of(attn.to_qkv, 128), by_slices, by_bare_slices):
        assert float((path - expected).norm() / expected.norm()) < 1e-5
    model.train()  # dropout has to run in PEFT's modules: the owner does nothing then, and says so
    assert not is_fused(attn.to_q)
    assert is_fused(attn.to_k)
    assert torch.equal(weight_of(attn.to_qkv, 128), bare)
    torch.manual_seed(1)
    x = torch.ones(4000, 128)
    dropped = (attn.to_q(x) - attn.to_q.base_layer(x)).mean(0).double().detach()
    wanted = deltas["transformer_blocks.0.attn.to_q"].sum(1)
    assert float((dropped - wanted).norm() / wanted.norm()) < 0.2


def test_switching_adapters_off_and_on(make_model: Make, run: Run) -> None:
    model = make_model()
    plain = run(model)
    model.add_adapter(config(), "a")
    with_a = run(model)
    model.add_adapter(config(r=3), "b")
    with_b = run(model)
    assert not torch.allclose(plain, with_a)
    assert not torch.allclose(with_a, with_b)
    model.disable_lora()
    assert torch.equal(run(model), plain)
    model.enable_lora()
    assert torch.equal(run(model), with_b)
    model.set_adapters(["a"], [0.0])
    torch.testing.assert_close(run(model), plain)
    model.set_adapters("a", 1.0)
    assert torch.equal(run(model), with_a)
    assert model.active_adapters() == ["a"]
    model.set_adapters(["a", "b"], [1.0, 1.0])
    both = run(model)
    assert not torch.allclose(both, with_a)
    model.delete_adapters("b")
    assert torch.equal(run(model), with_a)
    model.unload_lora()
    assert torch.equal(run(model), plain)
    assert not lora_layers(model)


def test_layers_that_somebody_still_holds_stop_acting(make_model: Make, run: Run) -> None:
    model = make_model()
    plain = run(model)
    model.add_adapter(config(), "a")
    held = list(lora_layers(model).values())
    model.unload_lora()
    assert torch.equal(run(model), plain)
    assert held
    wrapped = get_peft_model(model, config())
    held = list(lora_layers(wrapped).values())
    assert not torch.equal(run(model), plain)
    wrapped.unload()
    assert torch.equal(run(model), plain)
    assert held


def test_fused_adapters_outlive_their_layers_and_come_back_off(make_model: Make, run: Run) -> None:
    model = make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = run(model)
    model.add_adapter(config(EVERYTHING[:-3]), "a")  # 4-bit layers only
    model.set_adapters("a", 0.5)
    adapted = run(model)
    model.fuse_lora()
    torch.testing.assert_close(run(model), adapted)
    model.set_adapters("a", 2.0)  # fused is fused
    torch.testing.assert_close(run(model), adapted)
    model.unfuse_lora()
    model.set_adapters("a", 0.5)
    assert torch.equal(run(model), adapted)
    model.fuse_lora(safe_fusing=True)
    model.unload_lora()
    torch.testing.assert_close(run(model), adapted)
    assert {key: torch.equal(value, before[key]) for key, value in model.state_dict().items()} == dict.fromkeys(
        before, True
    )
    nunchaku_lora.reset(model)
    assert torch.equal(run(model), plain)


def test_merge_and_unload_of_peft(make_model: Make, run: Run) -> None:
    model = make_model()
    wrapped = get_peft_model(model, config(["to_q", "proj_out", "norm.linear"]))
    adapted = run(model)
    merged = wrapped.merge_and_unload()
    assert not lora_layers(merged)
    torch.testing.assert_close(run(merged), adapted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="not finite"):
        layer = next(iter(lora_layers(get_peft_model(merged, config(["to_k"]))).values()))
        with torch.no_grad():
            layer.lora_B["default"].weight.fill_(torch.inf)
        layer.merge(safe_merge=True)


def test_one_adapter_per_sample(make_model: Make) -> None:
    model = make_model()
    inject_adapter_in_model(config(["to_q"]), model, "a")
    inject_adapter_in_model(config(["to_q"]), model, "b")
    layer = model.transformer_blocks[0].attn.to_q
    x = torch.randn(3, 5, 128)
    layer.set_adapter("a")
    with torch.no_grad():
        mixed = layer(x, adapter_names=["b", "__base__", "a"])
        torch.testing.assert_close(mixed[2], layer(x)[2])
        layer.set_adapter("b")
        torch.testing.assert_close(mixed[0], layer(x)[0])
        layer.enable_adapters(False)
        torch.testing.assert_close(mixed[1], layer(x)[1])


def test_adapters_with_a_bias(make_model: Make) -> None:
    model = make_model()
    inject_adapter_in_model(config(["to_k", "proj_out", "norm.linear"], lora_bias=True), model)
    for layer in lora_layers(model).values():
        x = torch.zeros(1, layer.in_features)
        with torch.no_grad():
            layer.lora_B["default"].bias.copy_(torch.randn(layer.out_features))
            added = layer(x) - _without(layer, x)
        torch.testing.assert_close(added[0], 1.5 * layer.lora_B["default"].bias, rtol=1e-4, atol=1e-5)


def _without(layer: Any, x: torch.Tensor) -> torch.Tensor:
    layer.enable_adapters(False)
    y: torch.Tensor = layer(x)
    layer.enable_adapters(True)
    return y


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_initialisations_that_would_change_base_weights_are_refused(make_model: Make, init: str) -> None:
    with pytest.raises(ValueError, match=r"attn\.to_q.*changes the base weight, which is 4-bit"):
        inject_adapter_in_model(config(["to_q"], init_lora_weights=init), make_model())


def test_variants_that_read_base_weights_are_refused(make_model: Make) -> None:
    with pytest.raises(ValueError, match="use_dora trains on base weights in 16 bits"):
        inject_adapter_in_model(config(["to_q"], use_dora=True), make_model())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_training_reaches_the_adapters_only(make_model: Make, dropout: float) -> None:
    model = make_model()
    inject_adapter_in_model(config(["to_q", "proj_out", "norm1.linear"], lora_dropout=dropout), model)
    model.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    for layer in lora_layers(model).values():
        x = torch.randn(3, layer.in_features, requires_grad=True)
        layer(x).square().sum().backward()
        assert x.grad is not None
        assert layer.lora_A["default"].weight.grad.abs().sum() > 0
        assert layer.lora_B["default"].weight.grad.abs().sum() > 0


def test_gradients_are_those_of_a_dense_layer(make_model: Make, weight_of: Any) -> None:
    model = make_model()
    layer = model.transformer_blocks[0].attn.to_k
    dense = nn.Linear(128, 128)
    with torch.no_grad():
        dense.weight.copy_(weight_of(layer, 128))
        dense.bias.copy_(layer.bias)
    inject_adapter_in_model(config(["to_k"]), model)
    layer = model.transformer_blocks[0].attn.to_k
    twin = inject_adapter_in_model(config(["0"]), nn.Sequential(dense))[0]
    twin.load_state_dict({key: value for key, value in layer.state_dict().items() if "lora_" in key}, strict=False)
    x = torch.randn(5, 128)
    for module in (layer, twin):
        module(x).square().sum().backward()
    for name in ("lora_A", "lora_B"):
        mine, other = (getattr(module, name)["default"].weight.grad for module in (layer, twin))
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_copies_and_conversions(make_model: Make, run: Run) -> None:
    model = make_model()
    model.add_adapter(config(), "a")
    adapted = run(model)
    other = copy.deepcopy(model)
    model.set_adapters("a", 0.0)
    assert torch.equal(run(other), adapted)
    other.unload_lora()
    gc.collect()
    model.set_adapters("a", 1.0)
    assert torch.equal(run(model), adapted)
    half = run(model.bfloat16())
    assert float((half.float() - adapted).norm() / adapted.norm()) < 0.1  # all of the model is bfloat16 now


@pytest.mark.parametrize("offload", ["sequential", "group", "leaf"])
def test_offloaded_adapters_act_once(make_model: Make, run: Run, offload: str) -> None:
    model = make_model()
    model.add_adapter(config(), "a")
    expected = run(model)
    if offload == "sequential":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        kind = {
            "group": {"offload_type": "block_level", "num_blocks_per_group": 1},
            "leaf": {"offload_type": "leaf_level"},
        }
        model.enable_group_offload(onload_device=torch.device("cpu"), **kind[offload])
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


def test_state_dicts_have_peft_names(make_model: Make, run: Run) -> None:
    model = make_model()
    wrapped = get_peft_model(model, config())
    state = peft.get_peft_model_state_dict(wrapped)
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in state)
    adapted = run(model)
    other = make_model()
    torch.manual_seed(9)
    other_wrapped = get_peft_model(other, config())
    assert not torch.allclose(run(other), adapted)
    peft.set_peft_model_state_dict(other_wrapped, state)
    assert torch.equal(run(other), adapted)
    assert sum(isinstance(module, QuantizedLinear) for module in other.modules()) == sum(
        isinstance(module, QuantizedLinear) for module in model.modules()
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_swap_adapters_without_recompiling(make_model: Make, run: Run, backend: str) -> None:
    from peft.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap

    torch.compiler.reset()
    model = make_model()
    inject_adapter_in_model(config(["to_q", "to_v", "proj_out", "norm.linear"], r=3), model)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    first = run(compiled)
    torch.testing.assert_close(first, run(model), rtol=1e-4, atol=1e-4)
    state = {}
    for path, layer in lora_layers(model).items():
        state[f"{path}.lora_A.default.weight"] = torch.randn(8, layer.in_features)
        state[f"{path}.lora_B.default.weight"] = torch.randn(layer.out_features, 8)
    with torch.compiler.set_stance("fail_on_recompile"):
        hotswap_adapter_from_state_dict(
            compiled, {f"{k}": v for k, v in state.items()}, "default", config(r=8, alpha=2)
        )
        second = run(compiled)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, run(model), rtol=1e-4, atol=1e-4)


def test_strengths_are_set_without_anything_else(make_pipe: Make, run: Run) -> None:
    pipe = make_pipe()
    model = pipe.transformer
    model.add_adapter(config(), "a")
    model.add_adapter(config(r=2), "b")
    model.set_adapters(["a", "b"], [0.25, -1.0])
    expected = run(model)
    model.set_adapters(["a", "b"], [1.0, 1.0])
    for target in (pipe, model):
        nunchaku_lora.set_strength(target, {"a": 1.0})
        nunchaku_lora.set_strength(target, {"a": 0.25, "b": -1.0})
        assert torch.equal(run(model), expected)
    copied = copy.deepcopy(model)
    nunchaku_lora.set_strength(copied, {"a": 3.0})
    assert torch.equal(run(model), expected)
    assert not torch.equal(run(copied), expected)
    with pytest.raises(ValueError, match="there is no adapter 'c'; loaded: a, b"):
        nunchaku_lora.set_strength(pipe, {"a": 5.0, "c": 1.0})
    with pytest.raises(ValueError, match="strength of 'a' must be a finite number"):
        nunchaku_lora.set_strength(model, {"a": float("nan")})
    assert torch.equal(run(model), expected)
    model.unload_lora()
    plain = run(model)
    model.add_adapter(config(), "a")  # the same name, other layers
    nunchaku_lora.set_strength(model, {"a": 0.0})
    torch.testing.assert_close(run(model), plain)


def test_strengths_of_adapters_that_do_not_act_are_kept_and_said(
    make_model: Make, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    model.add_adapter(config(["to_q", "proj_out"]), "a")
    model.add_adapter(config(["to_k"]), "b")

    def said(strengths: dict[str, float]) -> list[str]:
        caplog.clear()
        nunchaku_lora.set_strength(model, strengths)
        return [record.getMessage() for record in caplog.records if record.name == "nunchaku_lora.adapters"]

    model.set_adapters("a")
    assert not said({"a": 0.5})
    expected = run(model)
    assert said({"a": 0.5, "b": 2.0}) == [
        "adapter 'b' is not active: its strength is kept, and acts when the adapter does"
    ]
    assert torch.equal(run(model), expected)
    model.disable_lora()
    assert "'a' is switched off" in said({"a": 2.0})[0]
    model.enable_lora()
    assert not torch.equal(run(model), expected)
    said({"a": 0.5})
    assert torch.equal(run(model), expected)
    model.fuse_lora(adapter_names=["a"])
    assert "'a' is fused" in said({"a": 2.0})[0]
    torch.testing.assert_close(run(model), expected)
    model.unfuse_lora()
    assert not torch.allclose(run(model), expected)


def test_switching_back_joins_nothing(make_pipe: Make, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make_pipe()
    model, results = pipe.transformer, {}
    nunchaku_lora.keep_joined(pipe, 100)
    for name, rank in (("a", 4), ("b", 20)):
        model.add_adapter(config(r=rank), name)
        model.set_adapters(name)
        results[name] = run(model)

    def fail(*_: Any) -> None:
        raise AssertionError("joined again")

    with monkeypatch.context() as patched:
        patched.setattr("nunchaku_kernels.nn._rank_axis._join", fail)
        patched.setattr("nunchaku_kernels.nn.w4a16.W4A16Linear._stacked", fail)
        for name in ("a", "b", "b", "a"):
            model.set_adapters(name)
            assert torch.equal(run(model), results[name])
        nunchaku_lora.keep_joined(model, 0)
        model.set_adapters("b")
        with pytest.raises(AssertionError, match="joined again"):
            for name in ("b", "a"):
                model.set_adapters(name)
                run(model)
    assert torch.equal(run(model), results["a"])
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`megabytes` must be a finite number and not negative"):
            nunchaku_lora.keep_joined(pipe, wrong)


def add_adapter(model: Any, rng: random.Random) -> None:
    targets = rng.sample(["to_q", "to_k", "to_v", "proj_out", "norm.linear"], rng.randint(1, 5))
    inject_adapter_in_model(config(targets, r=rng.randint(1, 20), alpha=3), model, f"n{rng.randrange(10**9)}")


def delete_adapter(model: Any, rng: random.Random) -> None:
    layer, name = chosen(model, rng)
    if len(layer.lora_A) > 1:
        with warnings.catch_warnings(action="ignore"):
            layer.delete_adapter(name)


def chosen(model: Any, rng: random.Random) -> tuple[Any, str]:
    layer = rng.choice(list(lora_layers(model).values()))
    return layer, rng.choice(list(layer.lora_A))


def factor(model: Any, rng: random.Random) -> Any:
    layer, name = chosen(model, rng)
    return rng.choice([layer.lora_A, layer.lora_B])[name]


def train(model: Any, rng: random.Random) -> None:
    layer, _ = chosen(model, rng)
    with torch.enable_grad():
        parameters = [each.requires_grad_() for held in (layer.lora_A, layer.lora_B) for each in held.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        loss = layer(torch.randn(2, layer.in_features, dtype=parameters[0].dtype)).float().square().mean()
        if loss.requires_grad:  # not so while adapters are off or fused
            loss.backward()
            optimizer.step()


def activate(model: Any, rng: random.Random) -> None:
    for layer in lora_layers(model).values():
        layer.set_adapter(rng.sample(list(layer.lora_A), rng.randint(1, len(layer.lora_A))))


def rescale(model: Any, rng: random.Random) -> None:
    layer, name = chosen(model, rng)
    value = rng.choice([-1.0, 0, 0.5, 2])
    rng.choice(
        [
            lambda: layer.set_scale(name, value),
            lambda: layer.scale_layer(value),
            lambda: layer.unscale_layer(),
            lambda: layer.scaling.__setitem__(name, value),
            lambda: layer.scaling.__setitem__(name, torch.tensor(float(value))),
            lambda: nunchaku_lora.set_strength(model, {name: value}),
        ]
    )()


def write(model: Any, rng: random.Random) -> None:
    weight = factor(model, rng).weight
    fresh = torch.randn_like(weight)
    rng.choice(
        [lambda: weight.copy_(fresh), lambda: weight.data.copy_(fresh), lambda: setattr(weight, "data", fresh)]
    )()


def hotswap(model: Any, rng: random.Random) -> None:
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    for layer in lora_layers(model).values():
        layer.unmerge()  # PEFT refuses to swap what is fused
    _, name = chosen(model, rng)
    state = {
        f"{path}.{side}.{name}.weight": torch.randn_like(getattr(layer, side)[name].weight)
        for path, layer in lora_layers(model).items()
        if name in layer.lora_A
        for side in ("lora_A", "lora_B")
    }
    hotswap_adapter_from_state_dict(model, state, name, config(r=3))


def fuse(model: Any, rng: random.Random) -> None:
    layer, _ = chosen(model, rng)
    if layer.merged:
        layer.unmerge()
    else:
        layer.merge()


def offload(model: Any, rng: random.Random) -> None:
    """What offloaders do: other storages behind the same parameters, and the old ones back."""
    for parameter in list(model.parameters()):
        before = parameter.data
        parameter.data = before.clone()
        if rng.random() < 0.5:
            parameter.data = before


def base(model: Any, rng: random.Random) -> None:
    owner = rng.choice([module for module in model.modules() if isinstance(module, QuantizedLinear)])
    rng.choice([parameter for parameter in owner.parameters() if parameter.is_floating_point()]).mul_(1.25)


def set_gain(model: Any, rng: random.Random) -> None:
    layer, name = chosen(model, rng)
    layer.set_gain(name, rng.choice([None, torch.randn(layer.out_features) / 4]))


MUTATIONS: dict[str, Callable[[Any, random.Random], Any]] = {
    "add": add_adapter,
    "delete": delete_adapter,
    "train": train,
    "activate": activate,
    "disable": lambda model, _: [layer.enable_adapters(False) for layer in lora_layers(model).values()],
    "enable": lambda model, _: [layer.enable_adapters(True) for layer in lora_layers(model).values()],
    "rescale": rescale,
    "write": write,
    "replace": lambda model, rng: (lambda m: setattr(m, "weight", nn.Parameter(m.weight * 2)))(factor(model, rng)),
    "hotswap": hotswap,
    "fuse": fuse,
    "offload": offload,
    "base": base,
    "gain": set_gain,
    "dtype": lambda model, rng: model.to(rng.choice([torch.float32, torch.bfloat16])),
    "evaluate": lambda model, rng: model.train(rng.random() < 0.5),
}


@given(steps=st.lists(st.sampled_from(sorted(MUTATIONS)), min_size=1, max_size=12), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_is_stale_after_any_sequence_of_changes(make_model: Make, steps: list[str], seed: int) -> None:
    """Layers keep what they joined; a copy keeps nothing and makes all of it anew."""
    model, rng = make_model().single_transformer_blocks, random.Random(seed)
    torch.manual_seed(seed)
    add_adapter(model, rng)
    block, x = model[0], torch.randn(2, 640)

    def results(block: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        given = x.to(dtype)
        parts = [block.attn.to_qkv, block.attn.to_k, block.norm.linear]
        return [part(given[:, :128]) for part in parts] + [block.proj_out(given)]

    for step in ["evaluate", *steps]:
        with torch.no_grad():
            MUTATIONS[step](model, rng)
            dtype = block.attn.to_qkv.compute_dtype
            kept, anew = results(block, dtype), results(copy.deepcopy(block), dtype)
        for mine, other in zip(kept, anew, strict=True):
            assert torch.equal(mine, other), step
