"""`NunchakuFluxTransformer2DModel`: a drop-in for diffusers' `FluxTransformer2DModel` with 4-bit layers."""

import os
from collections.abc import Callable
from typing import Any, Self

import torch
from diffusers import FluxTransformer2DModel

from nunchaku_kernels.ops import Arithmetic
from nunchaku_models.layers import quantized_layers, set_arithmetic
from nunchaku_models.loading import load_transformer, save_file, save_folder

_PIPELINE_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "low_cpu_mem_usage": (None, True),
    "use_safetensors": (None, True),
    "max_memory": (None,),
    "offload_folder": (None,),
    "offload_state_dict": (None, False),
    "use_flashpack": (None, False),
    "disable_mmap": (None, False, True),
    "quantization_config": (None,),
}
"""Arguments that diffusers passes to every component of a pipeline -> the values that mean nothing here."""


class NunchakuFluxTransformer2DModel(FluxTransformer2DModel):
    """FLUX.1 with 4-bit layers: `FluxPipeline.from_pretrained(base, transformer=model)`.

    Modules keep diffusers' names and blocks; hooks, attention processors, ControlNet residuals and offloading work as
    on the 16-bit model.
    """

    # What a saved pipeline's model_index.json says. diffusers loads classes only from modules that are imported
    # already, and `import nunchaku_models` alone should do.
    __module__ = "nunchaku_models"

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        arithmetic: Arithmetic | None = None,
        **kwargs: Any,
    ) -> "NunchakuFluxTransformer2DModel":
        """Load a quantised transformer.

        Args:
            pretrained_model_name_or_path: a published file, a quantised diffusers folder (of the transformer or of
                the whole pipeline), a legacy folder, or a hub path: `org/repo` or `org/repo/file.safetensors`.
            torch_dtype: dtype of the 16-bit tensors; default: that of the file.
            device: where the weights go.
            arithmetic: "w4a8", "w4a4", "nvfp4" or "w4a16"; default: the best the device has.
            kwargs: `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`, `variant`;
                `dtype` for `torch_dtype`; `device_map={"": device}`; what diffusers passes to every component.

        Raises:
            CheckpointError: the file is damaged, not quantised, or not FLUX.1; the message says which and what to do.
            ValueError: an arithmetic that the file's precision does not have.
            TypeError: an unknown argument.
        """
        torch_dtype = kwargs.pop("dtype", None) or torch_dtype
        device = _device_of(kwargs.pop("device_map", None), device)
        for name, harmless in _PIPELINE_ARGUMENTS.items():
            if kwargs.pop(name, None) not in harmless:
                raise ValueError(
                    f"from_pretrained: `{name}` is not supported; allowed: {', '.join(map(str, harmless))}"
                )
        model = load_transformer(
            cls, pretrained_model_name_or_path, dtype=torch_dtype, device=device, arithmetic=arithmetic, **kwargs
        )
        assert isinstance(model, cls)
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the model: a name ending in `.safetensors` becomes one published file, any other a diffusers folder.

        The folder holds a `quantization_config`: after `import nunchaku_models`, diffusers' own classes load it too.

        Args:
            save_directory: file or folder to write.
            is_main_process: whether this process writes.
            save_function: not used; here to fit diffusers' signature, as are `kwargs`.
            safe_serialization: must be True.
            variant: in a folder, part of the weight file's name.
            push_to_hub: must be False.
            kwargs: ignored; weights are never sharded.

        Raises:
            ValueError: `safe_serialization=False`, since pickles are not written, or `push_to_hub=True`.
            CheckpointError: the place cannot be written, or is a folder with other files in it.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False: 4-bit models are written as safetensors only")
        if push_to_hub:
            raise ValueError("push_to_hub is not supported; save, then upload with `hf upload`")
        if not is_main_process:
            return
        if os.fspath(save_directory).endswith((".safetensors", ".sft")):
            save_file(self, save_directory)
        else:
            save_folder(self, save_directory, variant=variant)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast; what is stored in 4 or 8 bits keeps its dtype."""
        # diffusers refuses to cast any quantised model, because most methods cannot
        self.is_quantized = False
        try:
            super().to(*args, **kwargs)
        finally:
            self.is_quantized = bool(quantized_layers(self))
        return self

    def half(self) -> Self:
        """Cast to float16, see `to`."""
        return self.to(torch.float16)

    def float(self) -> Self:
        """Cast to float32, see `to`."""
        return self.to(torch.float32)

    def set_arithmetic(self, arithmetic: Arithmetic | None) -> None:
        """Choose how 4-bit layers are multiplied, for this model; None for the device's best.

        Raises:
            ValueError: the stored precision cannot be multiplied that way; the message says what is possible.
        """
        set_arithmetic(self, arithmetic)


def _device_of(device_map: Any, device: torch.device | str) -> torch.device | str:
    if device_map is None:
        return device
    if isinstance(device_map, dict) and set(device_map) == {""}:
        return torch.device(device_map[""])
    if isinstance(device_map, str | torch.device) and device_map not in (
        "auto",
        "balanced",
        "balanced_low_0",
        "sequential",
    ):
        return torch.device(device_map)
    raise ValueError(f"from_pretrained: `device_map` must put the whole model on one device, got {device_map!r}")


NunchakuFluxTransformer2dModel = NunchakuFluxTransformer2DModel
"""The name under which the published engine's users know the class."""
