"""Actions wait for a module that somebody else imports, and change nothing about its import."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nunchaku_kernels.after_import import _AfterImport, after_import


@pytest.fixture
def late_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module that is on the path and not imported yet."""
    (tmp_path / "late_package").mkdir()
    (tmp_path / "late_package" / "__init__.py").write_text("")
    (tmp_path / "late_package" / "late.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "late_package.late"
    for name in ("late_package", "late_package.late"):
        sys.modules.pop(name, None)
    sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "target", "") != "late_package.late"]


def test_action_runs_after_the_import_and_once(late_module: str) -> None:
    seen: list[int] = []

    def action() -> None:
        seen.append(sys.modules[late_module].value)  # executed, not merely found

    after_import(late_module, action)
    after_import(late_module, action)
    assert importlib.util.find_spec(late_module) is not None  # somebody only asks whether the module exists
    assert seen == []
    assert importlib.import_module(late_module).value == 1
    assert seen == [1]
    assert not any(isinstance(finder, _AfterImport) for finder in sys.meta_path)
    after_import(late_module, action)
    assert seen == [1, 1]


def test_a_failing_import_stays_a_failing_import(late_module: str, tmp_path: Path) -> None:
    (tmp_path / "late_package" / "late.py").write_text("raise RuntimeError('broken')\n")
    after_import(late_module, lambda: None)
    with pytest.raises(RuntimeError, match="broken"):
        importlib.import_module(late_module)
    (tmp_path / "late_package" / "late.py").unlink()
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(late_module)
