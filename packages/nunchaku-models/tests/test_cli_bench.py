"""`nunchaku bench`: both benchmarks run, report in the one shape, and refuse what does not fit in one sentence."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from nunchaku_kernels.bench.quantizer import STEPS
from nunchaku_models.cli import plugins

Cli = Callable[..., tuple[int, str, str]]


def test_linear(cli: Cli) -> None:
    options = ("--tokens", 1, "--shape", "1024x1024", "--seconds", 0.01, "--json", "--verbose")
    code, out, _ = cli("bench", "linear", *options)
    names = {row["name"] for row in json.loads(out)["rows"]}
    assert code == 0 and names >= {"linear/w4a8/K1024-N1024/m1", "linear/w4a16/K1024-N1024/m1"}


def test_quantizer(cli: Cli) -> None:
    code, out, err = cli("bench", "quantizer", "--shape", "64x128", "--tokens", 200, "--seed", 3, "--json")
    assert code == 0 and "refined/K64-N128" in err  # progress
    names = {row["name"] for row in json.loads(out)["rows"]}
    assert names >= {f"quantizer/{step}/K64-N128/error" for step in STEPS}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "what"),
        (("nothing",), "nothing"),
        (("linear", "--shape", "64"), "--shape must be KxN"),
        (("linear", "--tokens", "0"), "at least 1"),
        (("linear", "--isa", "sse1"), "sse1"),
        (("linear", "--seconds", "0"), "above 0"),
        (("linear", "--device", "nowhere"), "nowhere"),
        (("linear", "--device", "meta"), "not a CUDA device"),
        (("linear", "--device", "cuda", "--threads", "2"), "for the CPU"),
        (("quantizer", "--shape", "64x"), "--shape must be KxN"),
        (("quantizer", "--shape", "100x64"), "multiple of 64"),
        (("quantizer", "--shape", "64x64", "--quick"), "exclude"),
        (("quantizer", "--precision", "int8"), "int8"),
        (("quantizer", "--quick", "--precision", "nvfp4", "--arithmetic", "w4a8"), "cannot be multiplied"),
        (("quantizer", "--quick", "--tokens", "2"), "at least 8"),
        (("quantizer", "--quick", "--device", "nowhere"), "nowhere"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], word: str, cli: Cli) -> None:
    code, out, err = cli("bench", *arguments)
    assert code == 2 and not out and word in err and "Traceback" not in err


def test_plug_ins(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise ImportError("no module named\nwhatever")

    def plain(kinds: Any) -> None:
        parser = kinds.add_parser("plain")
        parser.set_defaults(run=lambda args: print(json.dumps({"json": args.json})))

    def own_option(kinds: Any) -> None:
        parser = kinds.add_parser("own")
        parser.add_argument("--json", metavar="FILE")
        parser.set_defaults(run=lambda args: print(args.json))

    points = {"bad": broken, "plain": lambda: plain, "own": lambda: own_option}

    def entry_points(group: str) -> list[Any]:
        found = points if group == "nunchaku.bench" else {}
        return [SimpleNamespace(name=name, load=load) for name, load in found.items()]

    monkeypatch.setattr(plugins, "entry_points", entry_points)
    code, out, err = cli("bench", "plain", "--json", "--verbose")
    assert code == 0 and json.loads(out) == {"json": True}
    assert err == "nunchaku: the benchmark 'bad' is not available: no module named whatever\n"
    code, out, _ = cli("bench", "own", "--json", "x.json")
    assert code == 0 and out == "x.json\n"
    assert cli("bench", "linear", "--shape", "64")[0] == 2  # ours are still there


@pytest.mark.parametrize("what", [(), ("linear",), ("quantizer",)])
def test_help_has_an_example(what: tuple[str, ...], cli: Cli) -> None:
    code, out, _ = cli("bench", *what, "--help")
    assert code == 0 and "  nunchaku bench " in out and max(map(len, out.splitlines())) <= 130
