"""Registering the quantisation method with diffusers, now or when diffusers is imported.

diffusers has no registration function and takes seconds to import. If it is not imported yet, a finder waits on
`sys.meta_path` for the one module that holds the dictionaries, and steps aside after that.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_TARGET = "diffusers.quantizers.auto"


def register_with_diffusers() -> None:
    """Make `quant_method: svdquant` known to diffusers as soon as diffusers is there. Idempotent."""
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    from nunchaku_models.diffusers_quantizer import register

    register()


class _AfterImport:
    """Finds `_TARGET` where the other finders find it, and registers once it was executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # this spec's own loader
        return spec
