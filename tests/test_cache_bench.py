"""`nunchaku bench cache` on the demo: found, its rivals silent, its rows in the common form."""

import json

import pytest

from nunchaku_cache.bench.settings import OURS, RIVALS
from nunchaku_models.cli.main import main
from nunchaku_models.demo import benchmark


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for methods, kept in ((OURS, "ours-scheduled"), (RIVALS, "diffusers-taylorseer")):
        for method in set(methods) - {kept}:
            monkeypatch.delitem(methods, method)
    small = ("--quick", "--steps", "6", "--prompts", "1", "--settings", "2")
    assert main(["bench", "cache", *small, "--dtype", "bfloat16", "float32", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"machine", "commit", "rows"}
    for row in printed["rows"]:
        assert set(row) == {"name", "value", "unit", "baseline", "ratio"}
    rows = {row["name"]: row for row in printed["rows"]}
    for dtype in ("bfloat16", "float32"):
        row = rows[f"cache/{dtype}/steps6/1.5x/ours-scheduled"]
        assert row["unit"] == "dB" and 20 < row["value"] < 100
        assert row["baseline"].startswith("diffusers-taylorseer: ") and row["ratio"] > 0
    assert rows["cache/bfloat16/steps6/1.5x/ours-scheduled"] != rows["cache/float32/steps6/1.5x/ours-scheduled"]


def test_nothing_is_fitted_on_what_is_compared() -> None:
    compared, fitted = benchmark.prompts(), benchmark.calibration_prompts()
    assert len(fitted) >= 16 and len(compared) >= 16
    assert not set(compared) & set(fitted) and len(set(compared)) == len(compared)
