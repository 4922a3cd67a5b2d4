"""Names of a package are there, and import nothing before somebody asks."""

import sys
from pathlib import Path

import pytest

PACKAGE = """
from nunchaku_kernels.lazy import lazy_names
own = 1
__getattr__, __dir__ = lazy_names(__name__, {"value": "lazy_package.slow", "missing": "lazy_package.slow"})
"""


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazy_package").mkdir()
    (tmp_path / "lazy_package" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "lazy_package" / "slow.py").write_text("value = 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import lazy_package  # type: ignore[import-not-found]

    try:
        assert {"own", "value"} <= set(dir(lazy_package)) and "lazy_package.slow" not in sys.modules
        assert (lazy_package.own, lazy_package.value) == (1, 2)
        for name in ("missing", "no_such_thing"):
            with pytest.raises(AttributeError, match=name):
                getattr(lazy_package, name)
    finally:
        for name in ("lazy_package", "lazy_package.slow"):
            sys.modules.pop(name, None)
