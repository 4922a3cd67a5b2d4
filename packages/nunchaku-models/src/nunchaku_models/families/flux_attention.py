"""FLUX attention on fused 4-bit projections: x is quantised once for q, k and v."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb

from nunchaku_kernels.nn import QuantizedLinear, is_fused


class NunchakuFluxAttnProcessor:
    """Drop-in for diffusers' `FluxAttnProcessor`.

    The fused layer is used only while it does all that the modules under the original names would (`is_fused`): a slice
    that carries a hook, or an adapter that acts outside the fused layer, is called itself, so that nothing is ignored.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """hidden_states (B, T, D) and, in joint blocks, encoder_hidden_states (B, L, D) -> the same shapes."""
        query, key, value = _heads(attn, _project(attn, hidden_states, "to_qkv", ("to_q", "to_k", "to_v")))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if attn.added_kv_proj_dim is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj")
            text = _heads(attn, _project(attn, encoder_hidden_states, "add_qkv_proj", names))
            query = torch.cat([attn.norm_added_q(text[0]), query], dim=1)
            key = torch.cat([attn.norm_added_k(text[1]), key], dim=1)
            value = torch.cat([text[2], value], dim=1)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        mixed = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        mixed = mixed.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return mixed  # a single block: its proj_out follows outside
        length = encoder_hidden_states.shape[1]
        image = attn.to_out[1](attn.to_out[0](mixed[:, length:].contiguous()))
        return image, attn.to_add_out(mixed[:, :length].contiguous())


def _project(attn: Any, x: Any, owner_name: str, names: Sequence[str]) -> Sequence[torch.Tensor]:
    slices = [getattr(attn, name) for name in names]
    owner = getattr(attn, owner_name, None)
    if isinstance(owner, QuantizedLinear) and all(map(is_fused, slices)):
        fused: torch.Tensor = owner(x)
        return fused.chunk(len(slices), dim=-1)
    return [module(x) for module in slices]


def _heads(attn: Any, projections: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [x.unflatten(-1, (-1, attn.head_dim)) for x in projections]
