"""A real pipeline, and what people do to it: interrupt it, nest it, share its transformer, compile, offload, copy."""

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import nn

import nunchaku_cache
from nunchaku_cache import CacheHandle, DoubleFirstBlockCache, FirstBlockCache, Schedule, ScheduledCache, TeaCache

Case = Any
STEPS = 8
Draw = Callable[..., torch.Tensor]


@pytest.fixture
def pipe(flux: Case) -> FluxPipeline:
    """A pipeline of a tiny transformer alone; latents and embeddings are given and returned."""
    return pipeline(flux.make())


def pipeline(transformer: nn.Module, kind: Any = FluxPipeline) -> Any:
    result = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=transformer,
    )  # fmt: skip
    result.set_progress_bar_config(disable=True)
    return result


def embeddings(seed: int, batch: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(batch, 5, 24, generator=generator),
        "pooled_prompt_embeds": torch.randn(batch, 20, generator=generator),
    }


def draw(pipe: Any, prompt: int | dict[str, torch.Tensor] = 0, seed: int = 0, **kwargs: Any) -> torch.Tensor:
    """Latents (batch, 16, 8)."""
    given = embeddings(prompt) if isinstance(prompt, int) else prompt
    arguments = {"num_inference_steps": STEPS, "height": 64, "width": 64, "output_type": "latent"} | given | kwargs
    arguments["generator"] = torch.Generator().manual_seed(seed)
    result: torch.Tensor = pipe(**arguments).images
    return result


def cached(pipe: Any, threshold: float = 0.35, **kwargs: Any) -> CacheHandle:
    """A cache that skips some of the steps of the tiny pipeline."""
    return nunchaku_cache.apply(pipe, FirstBlockCache(threshold, **kwargs))


def test_some_steps_are_skipped(pipe: Any) -> None:
    plain = draw(pipe)
    handle = cached(pipe)
    drawn = draw(pipe)
    assert handle.stats.hits > 0 and handle.stats.misses > 1
    assert handle.stats.hits + handle.stats.misses == STEPS
    assert not torch.equal(drawn, plain)
    handle.stats.reset()
    assert torch.equal(draw(pipe), drawn), "a second call starts anew"
    assert handle.stats.hit_pattern()[0] == (False,)
    with handle.disabled():
        assert torch.equal(draw(pipe), plain)
    handle.threshold = 0
    assert torch.equal(draw(pipe), plain)


def test_guidance_has_a_state_per_branch(pipe: Any) -> None:
    negative = {f"negative_{name}": value for name, value in embeddings(7).items()}
    handle = cached(pipe)
    draw(pipe, true_cfg_scale=3.0, **negative)
    names = {record.branch for record in handle.stats.steps}
    assert names == {"cond", "uncond"}
    for name in names:
        assert handle.stats.hit_pattern(branch=name)[0] == (False,)
        assert len(handle.stats.hit_pattern(branch=name)) == STEPS
    # the same two branches where nobody names them
    for cache in handle._caches:
        cache._context_tap.remove()
    patterns = [handle.stats.hit_pattern(branch=name) for name in ("cond", "uncond")]
    handle.stats.reset()
    draw(pipe, true_cfg_scale=3.0, **negative)
    assert [handle.stats.hit_pattern(branch=name) for name in ("", "#2")] == patterns


def test_embeddings_of_the_same_values_on_both_sides_of_guidance(pipe: Any) -> None:
    same = {f"negative_{name}": value.clone() for name, value in embeddings(0).items()}
    handle = cached(pipe)
    draw(pipe, true_cfg_scale=3.0, **same)
    assert handle.stats.hit_pattern(branch="cond") == handle.stats.hit_pattern(branch="uncond")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("after", [0, 3])
def test_an_interrupted_call_leaves_no_state(pipe: Any, kind: type[BaseException], after: int) -> None:
    given = embeddings(0)  # held by the caller, so that only the call itself can end
    cached(pipe)
    expected = draw(pipe, given)

    def interrupt(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == after:
            raise kind
        return tensors

    with pytest.raises(kind):
        draw(pipe, given, seed=5, callback_on_step_end=interrupt)
    assert torch.equal(draw(pipe, given), expected)


@pytest.mark.parametrize("after", [0, 3])
def test_a_pipeline_told_to_stop_leaves_no_state(pipe: Any, after: int) -> None:
    given = embeddings(0)
    cached(pipe)
    expected = draw(pipe, given)

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= after
        return tensors

    draw(pipe, given, seed=5, callback_on_step_end=stop)
    assert torch.equal(draw(pipe, given), expected)


@pytest.mark.parametrize("same_prompt", [False, True])
def test_pipelines_that_share_a_transformer_do_not_see_each_other(pipe: Any, same_prompt: bool) -> None:
    """The second one draws a whole picture within every step of the first one."""
    given, handle = embeddings(0), cached(pipe)
    other, others = pipeline(pipe.transformer), given if same_prompt else embeddings(1)
    expected, expected_other = draw(pipe, given), draw(other, others, seed=3)

    def nested(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert torch.equal(draw(other, others, seed=3), expected_other)
        return tensors

    handle.stats.reset()
    assert torch.equal(draw(pipe, given, callback_on_step_end=nested), expected)
    assert handle.stats.hits


def test_threads_do_not_see_each_other(pipe: Any) -> None:
    handle = cached(pipe)
    given = embeddings(0)
    pipes = [pipe, *(pipeline(pipe.transformer) for _ in range(3))]
    expected = [draw(each, given, seed=i) for i, each in enumerate(pipes)]
    assert handle.stats.hits
    results: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        for _ in range(3):
            results[i] = draw(pipes[i], given, seed=i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(pipes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, one in enumerate(expected):
        assert torch.equal(results[i], one)


def test_another_pipeline_of_the_same_class_is_left_alone(pipe: Any, flux: Case) -> None:
    other = pipeline(flux.make())
    plain, call, forward = draw(other), FluxPipeline.__call__, type(pipe.transformer).forward
    handle = cached(pipe)
    assert torch.equal(draw(other), plain)
    assert not other.transformer.__dict__.keys() & {"_compiled_call_impl", "cache_context", "forward"}
    assert FluxPipeline.__call__ is call and type(pipe.transformer).forward is forward
    assert handle.stats.hits + handle.stats.misses == 0


def test_a_copy_has_no_cache(pipe: Any) -> None:
    plain, handle = draw(pipe), cached(pipe)
    duplicate = copy.deepcopy(pipe.transformer)
    assert torch.equal(draw(pipeline(duplicate)), plain)
    with duplicate.cache_context("cond"):
        pass
    assert handle.stats.hits + handle.stats.misses == 0
    # and changing the copy changes nothing here
    expected = draw(pipe)
    nn.init.zeros_(duplicate.proj_out.weight)
    assert torch.equal(draw(pipe), expected)


def test_nothing_is_held_once_a_call_is_over(pipe: Any) -> None:
    handle = cached(pipe)
    draw(pipe)
    gc.collect()
    assert all(len(cache._thread.calls) == 0 for cache in handle._caches)


def test_a_changed_batch_or_size_starts_anew(pipe: Any) -> None:
    handle = cached(pipe)
    expected = draw(pipe)
    draw(pipe, embeddings(0, batch=2))
    draw(pipe, height=32)
    handle.stats.reset()
    assert torch.equal(draw(pipe), expected)
    assert handle.stats.hit_pattern()[0] == (False,)


def test_a_call_that_starts_in_the_middle_of_a_schedule(pipe: Any) -> None:
    """As image to image does; an earlier call of the same prompt was left at a higher timestep."""
    handle, given = cached(pipe, float("inf")), embeddings(0)
    middle = {"sigmas": [0.6, 0.5, 0.3, 0.2], "num_inference_steps": 4}
    expected = draw(pipe, given, **middle)

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return tensors

    draw(pipe, given, seed=5, callback_on_step_end=stop)
    handle.stats.reset()
    assert torch.equal(draw(pipe, given, **middle), expected)
    assert handle.stats.hit_pattern() == [(False,), (True,), (True,), (True,)]


def test_timesteps_that_are_the_same_in_16_bits_are_steps(pipe: Any) -> None:
    handle = nunchaku_cache.apply(pipe.to(torch.bfloat16), FirstBlockCache(threshold=float("inf")))
    given = {name: value.bfloat16() for name, value in embeddings(0).items()}
    draw(pipe, given, num_inference_steps=300)
    timesteps = [record.timestep for record in handle.stats.steps]
    assert len(set(timesteps)) < len(timesteps) == 300
    assert {record.branch for record in handle.stats.steps} == {"cond"}
    assert handle.stats.misses == 1


def test_autocast(pipe: Any) -> None:
    transformer = pipe.transformer
    dtypes: list[torch.dtype] = []
    transformer.norm_out.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
    handle = cached(pipe, threshold=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn = draw(pipe)
    assert handle.stats.hits and len(set(dtypes)) == 1
    torch.testing.assert_close(drawn, draw(pipe), rtol=0.1, atol=0.1, check_dtype=False)


def test_changed_adapters_reset(pipe: Any) -> None:
    from peft import LoraConfig

    transformer = pipe.transformer
    for name in ("one", "two"):
        config = LoraConfig(r=2, target_modules=["to_q", "proj_out"], init_lora_weights=False)
        transformer.add_adapter(config, adapter_name=name)
    transformer.set_adapters(["one"])
    handle = nunchaku_cache.apply(pipe, FirstBlockCache(threshold=float("inf")))
    changes: list[Callable[[], Any]] = [
        lambda: transformer.set_adapters(["one"], [0.5]),
        lambda: transformer.set_adapters(["two"]),
        lambda: transformer.set_adapters(["one", "two"]),
        lambda: transformer.disable_lora(),
        lambda: transformer.enable_lora(),
        lambda: transformer.delete_adapters(["one"]),
        lambda: transformer.unload_lora(),
    ]

    def change(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step < len(changes):
            changes[step]()
        return tensors

    draw(pipe, callback_on_step_end=change)
    assert handle.stats.hit_pattern() == [(False,)] * STEPS


def test_a_schedule_keeps_its_place_when_adapters_change(pipe: Any) -> None:
    from peft import LoraConfig

    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="one")
    skip = [step not in (0, 3) for step in range(STEPS)]
    damping = [(1.0,) if skipped else () for skipped in skip]
    handle = nunchaku_cache.apply(pipe, ScheduledCache(Schedule("Flux", tuple(skip), tuple(damping), 0.1)))

    def change(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            pipe.transformer.set_adapters(["one"], [0.5])
        return tensors

    draw(pipe, callback_on_step_end=change)
    # the output from before the change stands in for nothing; from the next computed one on, all is as planned
    assert handle.stats.hit_pattern() == [(step not in (0, 1, 3),) for step in range(STEPS)]


def test_ip_adapter(pipe: Any) -> None:
    width, given, tokens = 32, 12, 4
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    projections = {
        f"{block}.to_{which}_ip.{kind}": random(*shape)
        for block in range(len(pipe.transformer.transformer_blocks))
        for which in "kv"
        for kind, shape in (("weight", (width, 24)), ("bias", (width,)))
    }
    image = {
        "proj.weight": random(tokens * 24, given), "proj.bias": random(tokens * 24),
        "norm.weight": torch.ones(24), "norm.bias": torch.zeros(24),
    }  # fmt: skip
    pipe.transformer._load_ip_adapter_weights({"image_proj": image, "ip_adapter": projections}, low_cpu_mem_usage=False)
    pictures = [[random(1, 1, given)] for _ in range(2)]
    negative = {"negative_ip_adapter_image_embeds": [torch.zeros(1, 1, given)]}  # else an image is encoded for it
    prompt = {**embeddings(0), **negative}  # the same objects for all calls
    plain = [draw(pipe, prompt, ip_adapter_image_embeds=picture) for picture in pictures]
    assert not torch.equal(*plain)
    handle = cached(pipe)
    drawn = [draw(pipe, prompt, ip_adapter_image_embeds=picture) for picture in pictures]
    assert handle.stats.hits
    for one, other in zip(drawn, plain, strict=True):
        assert 0 < (one - other).abs().mean() < 0.5 * (plain[0] - plain[1]).abs().mean()
    assert torch.equal(draw(pipe, prompt, ip_adapter_image_embeds=pictures[0]), drawn[0])
    handle.threshold = 0
    assert torch.equal(draw(pipe, prompt, ip_adapter_image_embeds=pictures[1]), plain[1])


def test_compiled_blocks_stay_compiled(pipe: Any) -> None:
    handle = cached(pipe)
    expected = draw(pipe)
    compiled: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    # behind the cache and before it
    pipe.transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    handle.stats.reset()
    torch.testing.assert_close(draw(pipe), expected)
    assert compiled and handle.stats.hits
    handle.remove()
    handle = cached(pipe)
    torch.testing.assert_close(draw(pipe), expected)
    assert handle.stats.hits
    handle.remove()
    assert all(block._compiled_call_impl is not None for block in pipe.transformer.transformer_blocks)
    torch._dynamo.reset()


def test_a_transformer_compiled_as_a_whole_is_refused(pipe: Any, flux: Case) -> None:
    compiled = torch.compile(flux.make(), backend="eager")
    with pytest.raises(ValueError, match="compile_repeated_blocks"):
        nunchaku_cache.apply(compiled, FirstBlockCache())


def test_blocks_that_are_offloaded_are_not_loaded_to_be_skipped(pipe: Any) -> None:
    expected = draw(pipe)
    handle = cached(pipe)
    expected = draw(pipe)
    accelerate.cpu_offload(pipe.transformer, execution_device="cpu")
    loads: list[int] = []
    last = pipe.transformer.single_transformer_blocks[-1].proj_out
    pre_forward = last._hf_hook.pre_forward
    last._hf_hook.pre_forward = lambda *a, **k: loads.append(1) or pre_forward(*a, **k)
    handle.stats.reset()
    torch.testing.assert_close(draw(pipe), expected)
    assert len(loads) == handle.stats.misses < STEPS
    # the order in which they came does not matter: hooks go and come under the cache
    accelerate.hooks.remove_hook_from_module(pipe.transformer, recurse=True)
    torch.testing.assert_close(draw(pipe), expected)


@pytest.mark.parametrize(
    "policy",
    [DoubleFirstBlockCache(0.35, 0.35, order=1), TeaCache(1.0), FirstBlockCache(0.35, order=2, final_steps=2)],
    ids=lambda policy: type(policy).__name__,
)
def test_other_policies_on_a_pipeline(pipe: Any, policy: Any) -> None:
    plain = draw(pipe)
    handle = nunchaku_cache.apply(pipe, policy)
    drawn = draw(pipe)
    assert handle.stats.hits
    assert handle.stats.hit_pattern()[-1] == (False,) or isinstance(policy, DoubleFirstBlockCache)
    assert (drawn - plain).abs().max() < 0.5 * plain.abs().max()
    handle.remove()
    assert torch.equal(draw(pipe), plain)


def test_a_second_cache_takes_the_place_of_the_first(pipe: Any) -> None:
    plain, first = draw(pipe), cached(pipe)
    second = nunchaku_cache.apply(pipe.transformer, DoubleFirstBlockCache(0.35))
    draw(pipe)
    assert first.stats.hits + first.stats.misses == 0 < second.stats.hits
    first.remove()
    draw(pipe)
    assert second.stats.hits
    second.remove()
    assert torch.equal(draw(pipe), plain)
