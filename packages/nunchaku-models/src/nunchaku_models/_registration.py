"""Registering the quantisation method with diffusers, now or when diffusers is imported."""

import importlib

from nunchaku_kernels.after_import import after_import

_TARGET = "diffusers.quantizers.auto"
"""The one module that holds the dictionaries; diffusers has no registration function."""


def register_with_diffusers() -> None:
    """Make `quant_method: svdquant` known to diffusers as soon as diffusers is there. Idempotent."""
    after_import(_TARGET, _register)


def _register() -> None:
    importlib.import_module("nunchaku_models.diffusers_quantizer")  # registers, unless it is just being imported
