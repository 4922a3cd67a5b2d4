"""The 16-bit weights that a planned layer is made from."""

import torch

from nunchaku_models.checkpoints import DiffusersView
from nunchaku_models.families import LowRankLinear
from nunchaku_models.layers import PlannedLayer, source_columns


def layer_columns(layer: PlannedLayer, width: int, rows: int) -> tuple[int, int]:
    """The input columns of its source(s), `width` x `rows`, that the layer takes."""
    return source_columns(layer.spec, width, rows) if isinstance(layer.spec, LowRankLinear) else (0, width)


def layer_weight(view: DiffusersView, layer: PlannedLayer) -> torch.Tensor:
    """The layer's weight (N, K), rows of fused sources one after another; a view of the map where possible."""
    parts = [view.tensor(f"{source}.weight") for source in layer.sources]
    start, stop = layer_columns(layer, parts[0].shape[1], parts[0].shape[0])
    parts = [part[:, start:stop] for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def layer_bias(view: DiffusersView, layer: PlannedLayer) -> torch.Tensor | None:
    """The layer's bias (N,). Of a linear split by columns, the part with the last columns carries it."""
    if isinstance(layer.spec, LowRankLinear) and layer.spec.columns == "head":
        return None
    names = [f"{source}.bias" for source in layer.sources]
    if not any(name in view for name in names):
        return None
    rows = layer_segments(view, layer)
    parts = [view.tensor(n).float() if n in view else torch.zeros(r) for n, r in zip(names, rows, strict=True)]
    return torch.cat(parts)


def layer_segments(view: DiffusersView, layer: PlannedLayer) -> list[int]:
    """Rows of each source."""
    return [view.info(f"{source}.weight").shape[0] for source in layer.sources]
