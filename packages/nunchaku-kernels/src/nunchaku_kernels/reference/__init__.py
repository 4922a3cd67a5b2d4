"""What every operator means, in plain torch on canonical tensors: the oracle of every kernel test.

One module per arithmetic (`w4a8`, `w4a4`, `nvfp4`, `w4a16`), each with its own rounding; `epilogue` is the tail they
share and `weights` the real numbers a stored weight stands for. `relative_l1` is the distance of caches.
"""

from nunchaku_kernels.reference import epilogue, nvfp4, relative_l1, w4a4, w4a8, w4a16, weights

__all__ = ["epilogue", "nvfp4", "relative_l1", "w4a4", "w4a8", "w4a16", "weights"]
