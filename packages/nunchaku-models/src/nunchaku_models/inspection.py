"""What a checkpoint is, from its header alone."""

import os
from collections import Counter
from typing import Any

from nunchaku_models.checkpoints import (
    detect_form,
    detect_precision,
    flux_config,
    is_quantised,
    open_checkpoint,
    parse_metadata,
    require_family,
)
from nunchaku_models.checkpoints.flux_config import canonical_infos


def inspect_checkpoint(path: str | os.PathLike[str], *, tensors: bool = False) -> dict[str, Any]:
    """Family, naming, precision, ranks, layers, bytes and configuration of a checkpoint; no tensor is read.

    Args:
        path: a file, a folder or a hub path, see `checkpoints.open_checkpoint`.
        tensors: add the list of tensors.

    Returns:
        Plain values, ready for JSON.

    Raises:
        CheckpointError: not a checkpoint of a known family, or damaged.
    """
    with open_checkpoint(path) as source:
        names = list(source)
        family = require_family(names, source.where)
        form = detect_form(source)
        quantized = is_quantised(form)
        infos = canonical_infos(source)
        metadata = parse_metadata(source.metadata, source.where)
        ranks = Counter(
            info.shape[1] for name, info in infos.items() if name.endswith(".proj_down") and len(info.shape) == 2
        )
        dtypes: Counter[str] = Counter()
        for name in names:
            info = source.info(name)
            dtypes[str(info.dtype).removeprefix("torch.")] += info.nbytes
        summary: dict[str, Any] = {
            "file": source.where,
            "family": family,
            "form": form,
            "precision": detect_precision(source) if quantized else "16-bit",
            "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
            "quantized_layers": sum(name.endswith(".qweight") for name in infos),
            "bytes": sum(dtypes.values()),
            "bytes_by_dtype": dict(dtypes.most_common()),
            "model_class": metadata.model_class,
            "config": flux_config(source),
        }
        if tensors:
            summary["tensors"] = [
                {
                    "name": name,
                    "dtype": str(source.info(name).dtype).removeprefix("torch."),
                    "shape": list(source.info(name).shape),
                }
                for name in names
            ]
    return summary
