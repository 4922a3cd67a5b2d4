"""4-bit tensors for diffusion transformers: formats, numerics, kernels, layers.

Rooms: `formats` (what the bytes of published checkpoints mean), `quantize` (float tensor -> 4-bit tensor),
`reference` (what every operator means, in plain torch), `ops` (torch.library operators), `nn` (layers built on them),
`doctor` (what this machine can run), `bench`, `after_import` and `lazy` (for packages built on this one). The package
needs torch only; it imports without a GPU driver.
"""

import logging

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())
