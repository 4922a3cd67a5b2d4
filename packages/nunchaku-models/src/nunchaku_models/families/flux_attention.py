"""FLUX attention on fused 4-bit projections: x is quantised once for q, k and v."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from nunchaku_kernels.nn import QuantizedLinear, SVDQLinear, is_fused

HEAD_DIM = 128
"""Of heads that fused layers finish themselves."""
IMAGE = ("to_q", "to_k", "to_v")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj")


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
        heads = _fused_heads(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        if heads is None:
            heads = _separate_heads(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        query, key, value = heads
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


def _separate_heads(
    attn: Any, image: torch.Tensor, text: torch.Tensor | None, rotary: tuple[torch.Tensor, torch.Tensor] | None
) -> Sequence[torch.Tensor]:
    """q, k and v (B, L + T, H, D), step by step."""
    query, key, value = _heads(attn, _project(attn, image, "to_qkv", IMAGE))
    query, key = attn.norm_q(query), attn.norm_k(key)
    if attn.added_kv_proj_dim is not None:
        added = _heads(attn, _project(attn, text, "add_qkv_proj", TEXT))
        query = torch.cat([attn.norm_added_q(added[0]), query], dim=1)
        key = torch.cat([attn.norm_added_k(added[1]), key], dim=1)
        value = torch.cat([added[2], value], dim=1)
    if rotary is not None:
        query = apply_rotary_emb(query, rotary, sequence_dim=1)
        key = apply_rotary_emb(key, rotary, sequence_dim=1)
    return query, key, value


def _fused_heads(
    attn: Any, image: torch.Tensor, text: torch.Tensor | None, rotary: tuple[torch.Tensor, torch.Tensor] | None
) -> Sequence[torch.Tensor] | None:
    """The same out of layers that norm, rotate and arrange heads themselves; None where one cannot, or must not."""
    streams = [(image, "to_qkv", IMAGE, attn.norm_q, attn.norm_k)]
    if attn.added_kv_proj_dim is not None:
        assert text is not None
        streams.insert(0, (text, "add_qkv_proj", TEXT, attn.norm_added_q, attn.norm_added_k))
    for x, owner_name, names, norm_q, norm_k in streams:
        owner = getattr(attn, owner_name, None)
        fused = isinstance(owner, SVDQLinear) and owner.fuses_heads(x) and attn.head_dim == HEAD_DIM
        if not fused or not all(is_fused(getattr(attn, name)) for name in names):
            return None
        if not _is_plain_norm(norm_q) or not _is_plain_norm(norm_k) or norm_q.eps != norm_k.eps:
            return None
    table = None
    if rotary is not None:  # diffusers repeats the angle of a pair of channels
        table = torch.stack([part[:, ::2].to(image.device, torch.float32) for part in rotary], dim=-1)
    tokens = sum(x.shape[1] for x, *_ in streams)
    out = image.new_empty(3, image.shape[0], attn.to_qkv.out_features // (3 * HEAD_DIM), tokens, HEAD_DIM)
    first = 0
    for x, owner_name, _, norm_q, norm_k in streams:
        last = first + x.shape[1]
        part = None if table is None else table[first:last].contiguous()
        getattr(attn, owner_name).forward_heads(
            x, out, first, norm_q=norm_q.weight, norm_k=norm_k.weight, eps=norm_q.eps, rotary=part
        )
        first = last
    return out.transpose(2, 3).unbind(0)


def _is_plain_norm(norm: nn.Module) -> bool:
    """Whether a norm is what a fused layer does with its weight: diffusers' own, and nothing attached to it."""
    hooks = (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks)
    plain = type(norm) is nn.RMSNorm and norm.weight is not None and norm.eps is not None
    return plain and "forward" not in vars(norm) and not any(hooks)


def _project(attn: Any, x: Any, owner_name: str, names: Sequence[str]) -> Sequence[torch.Tensor]:
    slices = [getattr(attn, name) for name in names]
    owner = getattr(attn, owner_name, None)
    if isinstance(owner, QuantizedLinear) and all(map(is_fused, slices)):
        fused: torch.Tensor = owner(x)
        return fused.chunk(len(slices), dim=-1)
    return [module(x) for module in slices]


def _heads(attn: Any, projections: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [x.unflatten(-1, (-1, attn.head_dim)) for x in projections]
