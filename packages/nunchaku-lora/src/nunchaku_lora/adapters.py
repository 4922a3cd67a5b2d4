"""Calls on a model that has adapters, beyond those of PEFT and diffusers."""

from torch import nn

from nunchaku_kernels.nn import QuantizedLinear
from nunchaku_lora.peft_layer import QuantizedLoraLinear


def reset(model: nn.Module) -> None:
    """Take every adapter off the 4-bit layers of `model` that no LoRA layer in it stands for: those that were fused.

    Stored tensors never changed, so the layers are then as they were loaded. 16-bit layers, into whose weights adapters
    were fused, are not restored: unfuse before unloading for those.
    """
    wrappers = [module for module in model.modules() if isinstance(module, QuantizedLoraLinear)]
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.detach_all()
    for wrapper in wrappers:
        wrapper.forget_fused()
        wrapper.owner.attach(wrapper, keep=False)
