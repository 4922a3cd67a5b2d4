"""Several LoRAs as one, and a converted LoRA as a file of diffusers' format."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn.functional import pad

from nunchaku_lora.formats.canonical import Lora, ModuleLora


def compose(parts: Sequence[tuple[Lora, float]]) -> Lora:
    """One LoRA that adds what several do together: their ranks side by side.

    Args:
        parts: converted LoRAs with their strengths.

    Raises:
        ValueError: shapes of one module differ (only `x_embedder` may have different widths), two LoRAs replace the
            same norm, or one has DoRA, which depends on the base weights.
    """
    result = Lora("diffusers")
    for section in ("modules", "text_encoder"):
        gathered: dict[str, list[ModuleLora]] = {}
        for lora, strength in parts:
            for path, part in getattr(lora, section).items():
                if part.dora is not None or part.gain is not None:
                    raise ValueError(
                        f"{path}: DoRA cannot be composed without the base model; load the files one by one"
                    )
                gathered.setdefault(path, []).append(_plain(part, strength))
        getattr(result, section).update({path: _side_by_side(path, found) for path, found in gathered.items()})
    for lora, _ in parts:
        for name, vector in lora.vectors.items():
            if name in result.vectors and not torch.equal(result.vectors[name], vector):
                raise ValueError(f"{name}: two of the LoRAs replace this norm, each by another")
            result.vectors[name] = vector
        result.notes += lora.notes
    return result


def to_tensors(lora: Lora, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """A converted LoRA under diffusers' names, with `.alpha` where it is not the rank.

    Args:
        lora: any.
        dtype: of the factors; default: their own.
    """
    tensors = {}
    for section, prefix in (("modules", "transformer."), ("text_encoder", "text_encoder.")):
        for path, part in getattr(lora, section).items():
            stem = prefix + path
            tensors[f"{stem}.lora_A.weight"] = part.down.to(dtype or part.down.dtype).contiguous().clone()
            tensors[f"{stem}.lora_B.weight"] = part.up.to(dtype or part.up.dtype).contiguous().clone()
            if part.alpha != part.rank:
                tensors[f"{stem}.alpha"] = torch.tensor(part.alpha)
            for ending, vector in (("diff_b", part.bias), ("dora_scale", part.dora), ("lora_gain", part.gain)):
                if vector is not None:
                    tensors[f"{stem}.{ending}"] = vector.contiguous().clone()
    for name, vector in lora.vectors.items():
        tensors[f"transformer.{name}"] = vector.contiguous().clone()
    return tensors


def _plain(part: ModuleLora, strength: float) -> ModuleLora:
    """The adapter times a strength, with alpha equal to the rank."""
    scale = strength * part.alpha / part.rank
    up = part.up if scale == 1 else part.up.float() * scale
    return replace(
        part, up=up, alpha=float(part.rank), bias=None if part.bias is None else part.bias.float() * strength
    )


def _side_by_side(path: str, parts: Sequence[ModuleLora]) -> ModuleLora:
    width, height = max(part.down.shape[1] for part in parts), parts[0].up.shape[0]
    for part in parts:
        narrower = part.down.shape[1] != width and not path.endswith("x_embedder")
        if part.up.shape[0] != height or narrower:
            raise ValueError(
                f"{path}: the LoRAs are for different models, {height} x {width} and "
                f"{part.up.shape[0]} x {part.down.shape[1]}"
            )
    down_dtype, up_dtype = (_common([getattr(part, name).dtype for part in parts]) for name in ("down", "up"))
    down = torch.cat([pad(part.down.to(down_dtype), (0, width - part.down.shape[1])) for part in parts])
    up = torch.cat([part.up.to(up_dtype) for part in parts], dim=1)
    biases = [part.bias.float() for part in parts if part.bias is not None]
    return ModuleLora(down, up, float(down.shape[0]), sum(biases[1:], biases[0]) if biases else None)


def _common(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return dtypes[0] if len(set(dtypes)) == 1 else torch.float32
