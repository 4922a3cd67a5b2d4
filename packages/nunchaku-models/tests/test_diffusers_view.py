"""DiffusersView: float8 files with and without scales, prefixes, all-in-one files, and files it must refuse."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nunchaku_models.checkpoints import CheckpointError, DiffusersView, SafetensorsReader, detect_form

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
QKV = "double_blocks.0.img_attn.qkv.weight"
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WIDTH = 4


def small_model(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The least that is recognised as a BFL file."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    names = ("img_in", "txt_in", "time_in.in_layer", "vector_in.in_layer")
    return {f"{name}.weight": random(WIDTH, 3) for name in names} | {
        QKV: random(3 * WIDTH, 5),
        "double_blocks.0.img_attn.qkv.bias": random(3 * WIDTH),
        "final_layer.adaLN_modulation.1.weight": random(2 * WIDTH, 3),
    }


def view_of(path: Path, state: dict[str, torch.Tensor], dtype: torch.dtype | None = None) -> DiffusersView:
    save_file(state, path / "a.safetensors")
    return DiffusersView(SafetensorsReader(path / "a.safetensors"), dtype)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, *FP8])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16])
def test_unscaled_tensors_of_every_dtype(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype | None) -> None:
    state = small_model(stored)
    view = view_of(tmp_path, state, wanted)
    expected_dtype = wanted or (torch.bfloat16 if stored in FP8 else stored)
    for index, name in enumerate(("to_q", "to_k", "to_v")):
        found = view.tensor(f"transformer_blocks.0.attn.{name}.weight")
        rows = state[QKV][index * WIDTH : (index + 1) * WIDTH].float()
        assert found.dtype == expected_dtype == view.info(f"transformer_blocks.0.attn.{name}.weight").dtype
        assert torch.equal(found, rows.to(expected_dtype))
        if wanted is None:
            assert torch.equal(found.float(), rows)  # bfloat16 holds both float8 formats exactly
    swapped = state["final_layer.adaLN_modulation.1.weight"].float()
    swapped = torch.cat([swapped[WIDTH:], swapped[:WIDTH]]).to(expected_dtype)
    assert torch.equal(view.tensor("norm_out.linear.weight"), swapped)
    assert torch.equal(view.rows("norm_out.linear.weight", 2, 7), swapped[2:7])
    view.release("norm_out.linear.weight")


@relaxed
@given(
    stored=st.sampled_from(FP8),
    suffix=st.sampled_from(["scale_weight", "weight_scale"]),
    scale=st.sampled_from([(), (1,), (1, 1), (3 * WIDTH,), (3 * WIDTH, 1)]),
    scale_dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    prefix=st.sampled_from(["", "model.diffusion_model."]),
    marker=st.sampled_from([None, 0, 2]),
)
def test_scaled_float8(
    tmp_path: Path,
    stored: torch.dtype,
    suffix: str,
    scale: tuple[int, ...],
    scale_dtype: torch.dtype,
    prefix: str,
    marker: int | None,
) -> None:
    state = small_model()
    state[QKV] = state[QKV].to(stored)
    factor = (torch.rand(scale) + 0.5).to(scale_dtype)
    module = QKV.removesuffix(".weight")
    state |= {f"{module}.{suffix}": factor, f"{module}.scale_input": torch.ones(())}
    state |= {f"{module}.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)}
    if marker is not None:
        state["scaled_fp8"] = torch.zeros(marker, dtype=torch.float8_e4m3fn)
    view = view_of(tmp_path, {prefix + name: tensor for name, tensor in state.items()})
    expected = (state[QKV].float().T * factor.float().reshape(-1)).T
    found = torch.cat([view.tensor(f"transformer_blocks.0.attn.to_{x}.weight") for x in "qkv"])
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(view.rows("transformer_blocks.0.attn.to_k.weight", 1, 3), expected[WIDTH + 1 : WIDTH + 3])
    assert len(view) == 4 + 6 + 1


def test_an_all_in_one_file_gives_its_transformer(tmp_path: Path) -> None:
    state = {"model.diffusion_model." + name: tensor for name, tensor in small_model().items()}
    state |= {"vae.decoder.mid.weight": torch.ones(1), "text_encoders.t5xxl.shared.weight": torch.ones(1)}
    view = view_of(tmp_path, state | {"scaled_fp8": torch.zeros(0)})
    assert len(view) == 4 + 6 + 1 and not any("vae" in name or "t5xxl" in name for name in view)
    with pytest.raises(CheckpointError, match=r"1 tensors outside it, such as 'foo\.weight'"):
        view_of(tmp_path, state | {"foo.weight": torch.ones(1)})


def test_prefixed_diffusers_names(tmp_path: Path) -> None:
    names = ("x_embedder", "context_embedder", "time_text_embed.timestep_embedder.linear_1")
    names += ("time_text_embed.text_embedder.linear_1", "transformer_blocks.0.attn.to_q")
    state = {f"transformer.{name}.weight": torch.ones(2, 3) for name in names}
    view = view_of(tmp_path, state)
    assert view.form == "diffusers"
    assert list(view) == [name.removeprefix("transformer.") for name in view.source]
    assert torch.equal(view.tensor("x_embedder.weight"), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"double_blocks.0.img_attn.qkv.scale_weight": torch.ones(5)}, "one per row"),
        ({"double_blocks.0.img_attn.qkv.scale_weight": torch.ones(3 * WIDTH, 2)}, "one per row"),
        ({"double_blocks.0.img_attn.qkv.weight_scale": torch.ones(3 * WIDTH, 1, dtype=torch.uint8)}, "one per row"),
        ({"double_blocks.0.img_attn.qkv.weight_scale": torch.full((), 2.0)}, "float8 weights only"),
        ({"double_blocks.0.img_attn.proj.scale_weight": torch.ones(())}, "without a weight of its own"),
        ({QKV: torch.ones(3 * WIDTH, 5, dtype=torch.int8)}, "torch.int8"),
        ({QKV: torch.ones(3 * WIDTH, 5, dtype=torch.uint8), QKV + ".absmax": torch.ones(1)}, "bitsandbytes"),
        ({"double_blocks.0.img_attn.qkv.weight_scale_2": torch.ones(())}, "NVFP4"),
        ({"other.weight": torch.ones(())}, "1 tensors that FLUX.1 does not have"),
    ],
)
def test_what_cannot_be_decoded_is_refused(tmp_path: Path, more: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        view_of(tmp_path, small_model() | more)
    assert "a.safetensors" in str(caught.value)


def test_a_scale_of_one_on_a_16_bit_weight_is_harmless(tmp_path: Path) -> None:
    state = small_model(torch.bfloat16)
    view = view_of(tmp_path, state | {"double_blocks.0.img_attn.qkv.scale_weight": torch.ones(())})
    assert torch.equal(view.tensor("transformer_blocks.0.attn.to_q.weight"), state[QKV][:WIDTH])


def test_quantised_files_and_other_models_are_refused(tmp_path: Path) -> None:
    names = ("x_embedder", "context_embedder", "time_text_embed.timestep_embedder.linear_1")
    state = {f"{name}.weight": torch.ones(1) for name in (*names, "time_text_embed.text_embedder.linear_1")}
    state["transformer_blocks.0.qkv_proj.qweight"] = torch.zeros(1, dtype=torch.int8)
    assert detect_form(state) == "nunchaku-v1"
    with pytest.raises(CheckpointError, match="already quantised"):
        view_of(tmp_path, state)
    with pytest.raises(CheckpointError, match="looks like an adapter"):
        view_of(tmp_path, {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1)})
