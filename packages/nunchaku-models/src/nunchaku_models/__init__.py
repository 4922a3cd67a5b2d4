"""4-bit diffusion transformers for diffusers.

Importing this package registers the quantisation method `svdquant` with diffusers, so that the stock `from_pretrained`
loads quantised folders. The model classes below are drop-ins for their diffusers counterparts.
"""

import logging
from typing import TYPE_CHECKING

from nunchaku_kernels.lazy import lazy_names as _lazy_names
from nunchaku_models._registration import register_with_diffusers as _register_with_diffusers

if TYPE_CHECKING:
    from nunchaku_models.flux import NunchakuFluxTransformer2DModel, NunchakuFluxTransformer2dModel
    from nunchaku_models.layers import arithmetics, set_arithmetic
    from nunchaku_models.quantizer import quantize_checkpoint

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())

_LAZY: dict[str, str] = {
    # diffusers looks for a loadable base class in the module that a saved pipeline names for a part: this one
    "ModelMixin": "diffusers",
    "NunchakuFluxTransformer2DModel": "nunchaku_models.flux",
    "NunchakuFluxTransformer2dModel": "nunchaku_models.flux",
    "arithmetics": "nunchaku_models.layers",
    "quantize_checkpoint": "nunchaku_models.quantizer",
    "set_arithmetic": "nunchaku_models.layers",
}
__all__ = [
    "NunchakuFluxTransformer2DModel",
    "NunchakuFluxTransformer2dModel",
    "arithmetics",
    "quantize_checkpoint",
    "set_arithmetic",
]

# diffusers takes seconds to import; `nunchaku inspect` and `--help` should not wait for it
__getattr__, __dir__ = _lazy_names(__name__, _LAZY)

_register_with_diffusers()
