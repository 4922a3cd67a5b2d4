"""For packages that tell a slow library about themselves: now, or when it is imported.

diffusers and transformers take seconds to import, and have no entry points for quantisation methods. A finder waits on
`sys.meta_path` for one of their modules, and steps aside after that.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(target: str, action: Callable[[], None]) -> None:
    """Call `action` once the module `target` is imported; now, if it is."""
    if target in sys.modules:
        action()
    elif not any(isinstance(finder, _AfterImport) and finder.target == target for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(target, action))


class _AfterImport:
    """Finds `target` where the other finders find it, and calls `action` after it was executed."""

    def __init__(self, target: str, action: Callable[[], None]) -> None:
        self.target = target
        self._action = action
        self._searching = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.target or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self._action()

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]  # this spec's own loader
        return spec
