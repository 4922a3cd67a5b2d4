"""`quantization_config`: there and back, and nothing unknown is passed over."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nunchaku_t5 import LayerForm, W4A16Config

forms = st.builds(LayerForm, bits=st.sampled_from([4, 8]), group_size=st.sampled_from([64, 128]))


@given(
    group_size=st.sampled_from([64, 128]),
    layers=st.dictionaries(st.from_regex(r"[a-z]+(\.[a-z0-9_]+)*", fullmatch=True), forms, max_size=5),
)
def test_there_and_back(group_size: int, layers: dict[str, LayerForm]) -> None:
    config = W4A16Config(group_size, layers)
    entries = json.loads(json.dumps(config.to_dict()))
    again, rest = W4A16Config.from_dict(entries, return_unused_kwargs=True, other=1)
    assert again.layers == layers and again.to_dict() == entries and rest == {"other": 1}
    assert all(
        entry == {} for name, entry in entries["layers"].items() if layers[name] == LayerForm(group_size=group_size)
    )


@pytest.mark.parametrize(
    "entries",
    [
        {"group_size": 96},
        {"group_size": "128"},
        {"group_size": True},
        {"quant_method": "awq"},
        {"layers": [1]},
        {"layers": {"a": 4}},
        {"layers": {"a": {"bits": 3}}},
        {"layers": {"a": {"bits": [4]}}},
        {"layers": {"a": {"colour": 1}}},
        {"modules_to_not_convert": ["a"]},
    ],
)
def test_refused(entries: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match="quantization_config"):
        W4A16Config.from_dict(entries)
