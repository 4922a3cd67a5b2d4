"""`quantization_config` of a quantised encoder: which modules are stored in few bits, and how."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from transformers.utils.quantization_config import QuantizationConfigMixin

from nunchaku_t5.errors import CheckpointError, shown

QUANT_METHOD = "nunchaku_w4a16"
GROUP_SIZES = (64, 128)
BITS = (4, 8)
RANK_LIMIT = 4096
LAYER_LIMIT = 100_000


@dataclass(frozen=True)
class LayerForm:
    """How one module is stored.

    Attributes:
        bits: 4 or 8 (linears), 8 (embeddings: one scale per row).
        group_size: inputs per scale of a linear: 64 or 128.
        rank: width of a linear's 16-bit low-rank branch; 0 for none.
    """

    bits: int = 4
    group_size: int = 128
    rank: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or not 0 <= self.rank <= RANK_LIMIT:
            raise ValueError(f"`rank` must be 0 to {RANK_LIMIT}, got {shown(self.rank)}")
        for name, value, allowed in (("bits", self.bits, BITS), ("group_size", self.group_size, GROUP_SIZES)):
            if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
                raise ValueError(f"`{name}` must be {' or '.join(map(str, allowed))}, got {shown(value)}")

    def overrides(self, default: "LayerForm") -> dict[str, Any]:
        """What differs from `default`, for JSON."""
        mine = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in mine.items() if value != getattr(default, name)}


class W4A16Config(QuantizationConfigMixin):
    """`{"quant_method": "nunchaku_w4a16", "group_size": 128, "layers": {module path: what differs, ...}}`.

    `layers` lists every quantised module; those of a value `{}` are linears of 4 bits in groups of `group_size`.

    Args:
        group_size: inputs per scale of layers that say nothing else.
        layers: module path -> `LayerForm`, or its fields that differ.

    Raises:
        ValueError, TypeError: an entry that this version does not know, or that has another type. Nothing is ignored:
            a model read by half is wrong and says nothing.
    """

    def __init__(
        self,
        group_size: int = 128,
        layers: Mapping[str, LayerForm | Mapping[str, Any]] | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(f"quantization_config: unknown entries {shown(sorted(unknown))}")
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quantization_config: `quant_method` must be {QUANT_METHOD!r}, got {shown(quant_method)}")
        layers = {} if layers is None else layers
        if not isinstance(layers, Mapping) or len(layers) > LAYER_LIMIT:
            raise TypeError(f"quantization_config: `layers` must map module paths to their form, got {shown(layers)}")
        self.quant_method = QUANT_METHOD
        self.group_size = group_size
        try:
            self._default = LayerForm(group_size=group_size)
        except ValueError as error:
            raise ValueError(f"quantization_config: {error}") from None
        self.layers = {name: self._form(name, entry) for name, entry in layers.items()}

    def _form(self, name: str, entry: LayerForm | Mapping[str, Any]) -> LayerForm:
        if isinstance(entry, LayerForm):
            return entry
        if not isinstance(name, str) or not isinstance(entry, Mapping):
            raise TypeError(f"quantization_config: layer {shown(name)} must be an object, got {shown(entry)}")
        known = {field.name for field in fields(LayerForm)}
        if not entry.keys() <= known:
            raise ValueError(
                f"quantization_config: layer {shown(name)} has unknown entries {shown(sorted(set(entry) - known))}"
            )
        try:
            return LayerForm(**{"group_size": self.group_size, **entry})
        except ValueError as error:
            raise ValueError(f"quantization_config: layer {shown(name)}: {error}") from None

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The inverse of `to_dict`; as transformers calls it."""
        config: Self = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "quant_method": self.quant_method,
            "group_size": self.group_size,
            "layers": {name: form.overrides(self._default) for name, form in self.layers.items()},
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """What transformers prints and writes."""
        return self.to_dict()


def parse_quantization(entries: object, where: str) -> W4A16Config:
    """The `quantization_config` that a file holds; `where` is for the message.

    Raises:
        CheckpointError: it is none of ours.
    """
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"{where} must be a JSON object, got {shown(entries)}")
    try:
        config: W4A16Config = W4A16Config.from_dict(entries)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    return config
