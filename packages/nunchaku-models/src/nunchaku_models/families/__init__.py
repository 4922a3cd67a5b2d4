"""Model families: one page each, chosen by name."""

from nunchaku_models.families.base import Block, Family, LowRankLinear, Modulation
from nunchaku_models.families.flux import FLUX

FAMILIES: dict[str, Family] = {FLUX.name: FLUX}

__all__ = ["FAMILIES", "FLUX", "Block", "Family", "LowRankLinear", "Modulation"]
