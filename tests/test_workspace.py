"""What uv does not check: versions and bounds inside the workspace, and which way imports point."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
ALLOWED = {"nunchaku-kernels": set[str]()}
"""Siblings a package may import; everything not listed may import the kernels."""


def project(package: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    return table


VERSIONS = {project(package)["name"]: Version(project(package)["version"]) for package in PACKAGES}


def module_of(name: str) -> str:
    return name.replace("-", "_")


def test_there_are_packages() -> None:
    assert {"nunchaku-kernels", "nunchaku-models"} <= set(VERSIONS)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_bounds_on_siblings_hold_and_are_bounded(package: Path) -> None:
    for text in project(package).get("dependencies", []):
        requirement = Requirement(text)
        if requirement.name in VERSIONS:
            assert requirement.specifier.contains(VERSIONS[requirement.name]), f"{package.name} requires {text}"
            bounded = any(bound.operator == "<" for bound in requirement.specifier)
            assert bounded, f"{package.name}: {text} has no upper bound"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_version_is_stated_once_in_effect(package: Path) -> None:
    name = project(package)["name"]
    source = (package / "src" / module_of(name) / "__init__.py").read_text()
    stated = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert stated is not None
    assert Version(stated[1]) == VERSIONS[name]
    assert f"## [{VERSIONS[name]}]" in (package / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_package_is_furnished(package: Path) -> None:
    name = project(package)["name"]
    assert package.name == name
    assert (package / "README.md").read_text().startswith(f"# {name}\n")
    assert (package / "src" / module_of(name) / "py.typed").is_file()
    assert list((package / "tests").glob("test_*.py"))
    assert project(package)["license"] == "Apache-2.0"
    assert project(package)["requires-python"] == ">=3.11"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_imports_point_to_the_kernels_only(package: Path) -> None:
    name = project(package)["name"]
    siblings = {module_of(other): other for other in VERSIONS if other != name}
    allowed = ALLOWED.get(name, {"nunchaku-kernels"})
    declared = {Requirement(text).name for text in project(package).get("dependencies", [])}
    for file in (package / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for imported in (siblings[n.split(".")[0]] for n in names if n.split(".")[0] in siblings):
                assert imported in allowed, f"{file.relative_to(ROOT)} imports {imported}"
                assert imported in declared, f"{file.relative_to(ROOT)} imports the undeclared {imported}"


def test_tracked_binaries_fit_the_budget() -> None:
    suffixes = {".safetensors", ".webp", ".png", ".jpg", ".bin", ".pt", ".npz"}
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout: which files are tracked cannot be known")
    files = [ROOT / name for name in tracked.stdout.split("\0") if Path(name).suffix in suffixes]
    assert files
    total = sum(path.stat().st_size for path in files if path.exists())
    assert total <= 48e6, f"{total / 1e6:.1f} MB of binaries"
