"""Published fused LoRA files of FLUX.1: packed factors under the engine's names, the base model's ranks first.

Such a file holds, for each 4-bit layer, the low-rank branch of the layer and the adapter as one, down rows and up
columns of the base first. What it adds is what follows the base's ranks: converting it needs the model it was made for.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from nunchaku_kernels.formats import unpack_lowrank_down, unpack_lowrank_up
from nunchaku_kernels.nn import LinearSlice, ModulationLinear, QuantizedLinear, SVDQLinear
from nunchaku_lora.formats.canonical import Lora, ModuleLora, checked

ENDINGS = (".lora_down", ".lora_up")

_JOINT: dict[str, tuple[tuple[str, ...], int]] = {
    "qkv_proj": (("attn.to_q", "attn.to_k", "attn.to_v"), 0),
    "qkv_proj_context": (("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), 0),
    "out_proj": (("attn.to_out.0",), 0),
    "out_proj_context": (("attn.to_add_out",), 0),
    "mlp_fc1": (("ff.net.0.proj",), 0),
    "mlp_fc2": (("ff.net.2",), 0),
    "mlp_context_fc1": (("ff_context.net.0.proj",), 0),
    "mlp_context_fc2": (("ff_context.net.2",), 0),
    "norm1.linear": (("norm1.linear",), 0),
    "norm1_context.linear": (("norm1_context.linear",), 0),
}
_SINGLE: dict[str, tuple[tuple[str, ...], int]] = {
    "qkv_proj": (("attn.to_q", "attn.to_k", "attn.to_v"), 0),
    "out_proj": (("proj_out",), 0),
    "mlp_fc1": (("proj_mlp",), 0),
    "mlp_fc2": (("proj_out",), 1),
    "norm.linear": (("norm.linear",), 0),
}
"""Published name -> the linears, and which of the layers that compute them."""


def is_published(keys: Sequence[str]) -> bool:
    """Whether any of the keys is one of a published fused file."""
    return any(key.endswith(ENDINGS) for key in keys)


def convert_published(
    tensors: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module]
) -> tuple[Lora, dict[str, torch.Tensor]]:
    """The adapters of a published fused file.

    Args:
        tensors: by the file's keys.
        modules: the linears of the model by path.

    Returns:
        What was converted, and the tensors whose keys are not the engine's (16-bit layers have diffusers' names).

    Raises:
        ValueError: half a pair, shapes that do not fit, or the branch of another base model.
    """
    lora = Lora("published (fused)")
    pieces: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    packed = {key for key in tensors if key.endswith(ENDINGS)}
    for key in sorted(packed):
        stem, _, ending = key.rpartition(".")
        other = f"{stem}.{'lora_up' if ending == 'lora_down' else 'lora_down'}"
        if other not in tensors:
            raise ValueError(f"{key}: there is no {other}")
        if ending == "lora_up":
            continue
        found = _owner(stem, modules)
        if isinstance(found, str):
            lora.skipped += [(key, found), (other, found)]
            continue
        paths, owner, parts = found
        lora.applied += [key, other]
        for path in paths:
            lora.sources.setdefault(path, []).extend((key, other))
        if tensors[key].numel() == 0:
            continue  # a layer without adapter: an empty placeholder
        down, up = _unpacked(stem, owner, checked(key, tensors[key]), checked(other, tensors[other]))
        for path, (rows, columns, width) in zip(paths, parts, strict=True):
            spread = torch.nn.functional.pad(down, (columns[0], width - columns[1]))
            pieces.setdefault(path, []).append((spread, up[slice(*rows)]))
    for path, found_pieces in pieces.items():
        down, up = _joined(found_pieces)
        used = (up != 0).any(0) & (down != 0).any(1)
        if bool(used.any()):  # ranks were padded with zeros
            lora.modules[path] = ModuleLora(down[used].contiguous(), up[:, used].contiguous(), float(used.sum()))
    return lora, {_named(key): value for key, value in tensors.items() if key not in packed}


_Part = tuple[tuple[int, int], tuple[int, int], int]


def _owner(stem: str, modules: Mapping[str, nn.Module]) -> tuple[list[str], QuantizedLinear, list[_Part]] | str:
    """The linears of a published name, the layer that computes them, and each one's rows, columns and width; or why
    there are none."""
    match = re.fullmatch(r"((single_)?transformer_blocks\.\d+)\.(.+)", stem)
    names = (_SINGLE if match[2] else _JOINT).get(match[3]) if match else None
    if match is None or names is None:
        return "FLUX.1 has no such layer"
    paths = [f"{match[1]}.{name}" for name in names[0]]
    owner, parts = None, []
    for path in paths:
        module = modules.get(path)
        if isinstance(module, LinearSlice) and names[1] < len(module.parts):
            part = module.parts[names[1]]
            owner = part.owner
            parts.append((part.rows, part.columns, module.in_features))
        elif isinstance(module, QuantizedLinear):
            owner = module
            parts.append(((0, module.out_features), (0, module.in_features), module.in_features))
        else:
            return f"{path} is not a 4-bit layer of the model"
    assert owner is not None
    return paths, owner, parts


def _unpacked(
    stem: str, owner: QuantizedLinear, down: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The adapter alone: down (r, in_features), up (out_features, r)."""
    k, n = owner.in_features, owner.out_features
    if isinstance(owner, ModulationLinear):
        if down.dim() != 2 or up.shape != (n, down.shape[0]) or down.shape[1] != k:
            raise ValueError(f"{stem}: expected (r, {k}) and ({n}, r), got {tuple(down.shape)} and {tuple(up.shape)}")
        # stored channel-major, as the layer's own rows are
        return down, up.unflatten(0, (-1, owner.num_chunks)).transpose(0, 1).flatten(0, 1)
    assert isinstance(owner, SVDQLinear)
    wide, high, rank = owner.proj_down.shape[0], owner.proj_up.shape[0], down.shape[-1]
    if down.shape != (wide, rank) or up.shape != (high, rank):
        raise ValueError(f"{stem}: expected ({wide}, r) and ({high}, r), got {tuple(down.shape)} and {tuple(up.shape)}")
    down, up = unpack_lowrank_down(down)[:, :k], unpack_lowrank_up(up)[:n]
    if owner.rank:
        base = unpack_lowrank_down(owner.proj_down.detach())[:, :k].to(down.device, down.dtype)
        if rank < owner.rank or not torch.equal(down[: owner.rank], base):
            raise ValueError(f"{stem}: the file was made for another base model, whose branch it holds")
        down, up = down[owner.rank :], up[:, owner.rank :]
    return down, up


def _joined(pieces: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One pair for a linear whose layers each have some of its columns."""
    (down, up), *rest = pieces
    for more_down, more_up in rest:
        if more_up.shape == up.shape and torch.equal(more_up, up):
            down = down + more_down
        else:
            down, up = torch.cat([down, more_down]), torch.cat([up, more_up], dim=1)
    return down, up


def _named(key: str) -> str:
    """Norms of queries and keys have no `attn.` in published files."""
    return re.sub(r"(transformer_blocks\.\d+)\.(norm_(?:added_)?[qk]\.weight)$", r"\1.attn.\2", key)
