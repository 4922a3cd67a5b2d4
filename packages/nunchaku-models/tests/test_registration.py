"""diffusers learns of the quantisation method whichever package is imported first, and is never imported for it."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.quantizers import auto

import nunchaku_models
from nunchaku_models._registration import register_with_diffusers
from nunchaku_models.diffusers_quantizer import SVDQuantConfig, SVDQuantQuantizer
from nunchaku_models.flux import NunchakuFluxTransformer2DModel


def test_diffusers_imported_first() -> None:
    """conftest.py imports diffusers before nunchaku_models."""
    assert auto.AUTO_QUANTIZER_MAPPING["svdquant"] is SVDQuantQuantizer
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["svdquant"] is SVDQuantConfig
    register_with_diffusers()
    assert auto.AUTO_QUANTIZER_MAPPING["svdquant"] is SVDQuantQuantizer


def test_importing_the_package_is_enough_for_a_pipeline_that_names_our_class(
    pipeline_folder: Path, int4_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = NunchakuFluxTransformer2DModel.from_pretrained(int4_file)
    FluxPipeline.from_pretrained(pipeline_folder, transformer=model, torch_dtype=torch.bfloat16).save_pretrained(
        tmp_path / "saved"
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "nunchaku_models"]:
        monkeypatch.delitem(sys.modules, name)
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(mapping, "svdquant")
    with pytest.raises(ValueError, match="import nunchaku_models"):  # diffusers imports nothing a file names
        FluxPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    importlib.import_module("nunchaku_models")
    pipe = FluxPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert type(pipe.transformer).__name__ == "NunchakuFluxTransformer2DModel"
    for name, value in model.state_dict().items():
        assert torch.equal(value, pipe.transformer.state_dict()[name]), name


SCRIPT = """
import contextlib, io, sys
import nunchaku_models
from nunchaku_models.cli.main import main
assert nunchaku_models.__version__
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:
    main(["--help"])
assert "quantize" in shown.getvalue()
assert "torch" not in sys.modules
with contextlib.redirect_stdout(io.StringIO()) as shown:
    assert main(["inspect", sys.argv[1]]) == 0
assert "int4" in shown.getvalue()
slow = {"diffusers", "transformers", "accelerate"} & sys.modules.keys()
assert not slow, slow
from diffusers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["svdquant"].__module__ == "nunchaku_models.diffusers_quantizer"
print("fine")
"""


def test_fresh_process(int4_file: Path) -> None:
    """Help and inspect import nothing slow; diffusers imported later knows the method."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(int4_file)], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "fine", done.stderr


def test_module_that_registers_imported_first() -> None:
    """It imports diffusers itself, and is itself what registers: neither may wait for the other."""
    script = "from nunchaku_models.diffusers_quantizer import SVDQuantQuantizer as ours, auto\n"
    script += "print(auto.AUTO_QUANTIZER_MAPPING['svdquant'] is ours)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "True", done.stderr


def test_public_names() -> None:
    for name in nunchaku_models.__all__:
        assert getattr(nunchaku_models, name) is not None
        assert name in dir(nunchaku_models)
    with pytest.raises(AttributeError, match="no_such_thing"):
        nunchaku_models.no_such_thing  # noqa: B018
