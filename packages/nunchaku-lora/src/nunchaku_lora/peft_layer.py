"""The PEFT layer of a 4-bit linear: ordinary `lora_A`, `lora_B`, `scaling`, computed by the linear's owner."""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from nunchaku_kernels.nn import AdapterTerm, LinearSlice, LowRankAdapter, QuantizedLinear

QUANTIZED = (QuantizedLinear, LinearSlice)

SAFE_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base weight alone. The others subtract from it; 4-bit weights stay."""


class QuantizedLoraLinear(Linear):
    """LoRA on a `QuantizedLinear` or a `LinearSlice`.

    PEFT and diffusers treat it like any LoRA layer. It is attached to the owner of the linear, which asks it for its
    terms on every call: so an adapter acts once, whether the owner is called fused, through the slice, or through this
    module. Only where PEFT's modules must run themselves (dropout while training, hooks of an offloader on `lora_A`,
    one adapter per sample) it has no terms and adds the branch in its own forward.

    Fusing (`merge`) moves the active adapters into the owner, where they stay when this module is removed; no stored
    tensor changes. DoRA comes as `lora_gain`: what a row's factor exceeds 1 by, the up factor being multiplied by it.
    """

    other_param_names = (*Linear.other_param_names, "lora_gain")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        self.acts_alone = False
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.lora_gain = nn.ParameterDict()
        self._fused: dict[str, LowRankAdapter] = {}
        self.owner.attach(self, keep=False)

    @property
    def owner(self) -> QuantizedLinear | LinearSlice:
        """The wrapped linear."""
        base = self.get_base_layer()
        assert isinstance(base, QUANTIZED)
        return base

    @property
    def weight(self) -> torch.Tensor:
        """The shape, dtype and device of the original weight, without its values."""
        return self.owner.weight

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """None of PEFT's variants: they read or change base weights."""
        return {(): None}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return self.owner.in_features, self.owner.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add or replace an adapter, see PEFT.

        Raises:
            ValueError: an initialisation or variant that needs the base weight in 16 bits.
        """
        where = kwargs.get("target_name") or "4-bit layer"
        if config.init_lora_weights not in SAFE_INITS:
            raise ValueError(
                f"{where}: init_lora_weights={config.init_lora_weights!r} changes the base weight, which is 4-bit; use "
                f"one of {SAFE_INITS}"
            )
        if config.use_dora:
            raise ValueError(f"{where}: use_dora trains on base weights in 16 bits; DoRA files can be loaded")
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    @property
    def acts_on_owner(self) -> bool:
        """Whether the owner computes what the active adapters add."""
        return not self.acts_alone and self._plain_terms() is not None

    def terms(self) -> list[AdapterTerm]:
        """What the owner has to add."""
        if self._disable_adapters or self.merged_adapters or self.acts_alone:
            return []
        return self._plain_terms() or []

    def _plain_terms(self) -> list[AdapterTerm] | None:
        """The terms of the active adapters, unless a module of theirs does what a product with its weight would not.

        Runs for every layer on every call: hence no attributes of modules, which take ten times as long to find.
        """
        held, found = self._modules, []
        downs, ups, gains = held["lora_A"]._modules, held["lora_B"]._modules, held["lora_gain"]._parameters
        for name in self.active_adapters:
            if name not in downs:
                continue
            down, up = downs[name], ups[name]
            for module in (down, up):
                if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
                    return None
                if "forward" in module.__dict__:
                    return None
            if self.training and type(held["lora_dropout"]._modules[name]) is not nn.Identity:
                return None
            tensors = up._parameters
            term = AdapterTerm(
                down._parameters["weight"], tensors["weight"], self.scaling[name], tensors["bias"], gains.get(name)
            )
            found.append(term)
        return found

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features); `adapter_names`: one adapter per sample, see PEFT."""
        self._check_forward_args(x, *args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            return self._each_its_own(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters or self.merged_adapters or self.acts_on_owner:
            return y
        return self._add_branches(x, y)

    def _add_branches(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result = y
        for name in self._acting():
            down, up = self.lora_A[name], self.lora_B[name]
            branch = up(down(self.lora_dropout[name](x.to(down.weight.dtype))))
            if name in self.lora_gain:
                own = self.owner.natural_bias() if isinstance(self.owner, QuantizedLinear) else self.owner.bias
                branch = branch + self.lora_gain[name] * (y if own is None else y - own)
            result = result + branch * self.scaling[name]
        return result.to(y.dtype)

    def _each_its_own(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if any(name in self.lora_gain for name in kwargs["adapter_names"]):
            raise ValueError("Cannot pass `adapter_names` when DoRA is enabled.")
        self.acts_alone = True
        try:
            result: torch.Tensor = super().forward(x, *args, **kwargs)
        finally:
            self.acts_alone = False
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Let the owner keep the (active) adapters with their present strengths, whatever happens to this module.

        Args:
            safe_merge: raise ValueError if their values are not finite.
            adapter_names: which; default: the active ones.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            up, gain = self.lora_B[name], self.lora_gain.get(name, None)
            fused = LowRankAdapter(self.lora_A[name].weight, up.weight, float(self.scaling[name]), up.bias, gain)
            for field in ("down", "up", "bias", "gain"):
                tensor = getattr(fused, field)
                if tensor is None:
                    continue
                if safe_merge and not bool(tensor.isfinite().all()):
                    raise ValueError(f"adapter {name!r} has values that are not finite")
                setattr(fused, field, tensor.detach().clone())
            self.owner.attach(fused)
            self._fused[name] = fused
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take back what `merge` did."""
        for name in self.merged_adapters:
            self.owner.detach(self._fused.pop(name))
        self.merged_adapters.clear()

    def forget_fused(self) -> None:
        """Count no adapter as fused any more, without touching the owner."""
        self._fused.clear()
        self.merged_adapters.clear()

    def enable_adapters(self, enabled: bool) -> None:
        """See PEFT; switching off takes fused adapters back, too."""
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT puts in this module's place: the linear, with the fused adapters or without any."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self.release()
        return self.owner

    def set_gain(self, name: str, gain: torch.Tensor | None) -> None:
        """Give an adapter of this layer DoRA's gain, (out_features) in units of its scaling, or take it away."""
        if name in self.lora_gain:
            del self.lora_gain[name]
        if gain is not None:
            like = self.lora_B[name].weight
            self.lora_gain[name] = nn.Parameter(gain.to(like.device, torch.float32), requires_grad=False)

    def release(self) -> None:
        """Stop acting: this module is about to leave the model."""
        self.owner.detach(self)

    def _acting(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]


def dispatch_quantized(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> QuantizedLoraLinear | None:
    """PEFT dispatcher: a layer for `target` if that is (a wrapper of) a 4-bit linear, else None."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base, QUANTIZED):
        return None
    return QuantizedLoraLinear(target, adapter_name, config=config, **kwargs)
