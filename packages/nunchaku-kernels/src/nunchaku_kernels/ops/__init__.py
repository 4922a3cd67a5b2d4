"""torch.library operators. Importing this module registers them as `torch.ops.nunchaku_kernels.*`.

The schemas, with shapes and orders, are in `_library.py`. Each arithmetic is one file.
"""

from nunchaku_kernels.ops import nvfp4, relative_l1, svdq_w4a16, w4a4, w4a8, w4a16
from nunchaku_kernels.ops._library import SCHEMAS
from nunchaku_kernels.ops.arithmetic import ARITHMETICS, Arithmetic, check_arithmetic, default_arithmetic

__all__ = [
    "ARITHMETICS",
    "SCHEMAS",
    "Arithmetic",
    "check_arithmetic",
    "default_arithmetic",
    "nvfp4",
    "relative_l1",
    "svdq_w4a16",
    "w4a4",
    "w4a8",
    "w4a16",
]
