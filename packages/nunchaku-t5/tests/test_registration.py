"""transformers learns of the method whichever package is imported first, and is never imported for it."""

import subprocess
import sys

import pytest

import nunchaku_t5

OURS_FIRST = """
import sys
import nunchaku_t5
from nunchaku_t5 import cli
assert nunchaku_t5.__version__
slow = {"torch", "transformers"} & sys.modules.keys()
assert not slow, slow
from transformers import T5EncoderModel
"""
THEIRS_FIRST = """
from transformers import T5EncoderModel
import nunchaku_t5
"""
QUANTIZER_FIRST = """
from nunchaku_t5 import quantize_encoder
from transformers import T5EncoderModel
import nunchaku_t5
"""
CHECK = """
from transformers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["nunchaku_w4a16"].__module__ == "nunchaku_t5.quantizer"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["nunchaku_w4a16"] is nunchaku_t5.W4A16Config
print("fine")
"""


SCRIPTS = {"ours first": OURS_FIRST, "theirs first": THEIRS_FIRST, "our quantizer first": QUANTIZER_FIRST}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_fresh_process(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script + CHECK], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "fine", done.stderr


def test_public_names() -> None:
    for name in nunchaku_t5.__all__:
        assert getattr(nunchaku_t5, name) is not None
        assert name in dir(nunchaku_t5)
    with pytest.raises(AttributeError, match="no_such_thing"):
        nunchaku_t5.no_such_thing  # noqa: B018
