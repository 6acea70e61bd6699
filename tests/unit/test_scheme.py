"""What each scheme needs and says of itself."""

from __future__ import annotations

import pytest

from nybble.formats.block import FP8, FP8_BLOCK, FP8_CHANNEL, MXFP4, NVFP4
from nybble.formats.scheme import SCHEMES


def test_schemes_are_found_by_name() -> None:
    assert {str(s): s for s in SCHEMES.values()} == SCHEMES


@pytest.mark.parametrize(
    ("name", "weight", "activation", "needs_input_scale"),
    [
        ("bf16", None, "BF16", False),
        ("nvfp4-w4a16", NVFP4, "BF16", False),
        ("nvfp4-w4a4", NVFP4, "FP4", True),
        ("mxfp4-w4a16", MXFP4, "BF16", False),
        ("fp8-static", FP8, "FP8 static", True),
        ("fp8-dynamic", FP8_CHANNEL, "FP8 dynamic", False),
        ("fp8-block", FP8_BLOCK, "FP8 dynamic", False),
    ],
)
def test_what_a_scheme_stores_and_runs(
    name: str, weight: object, activation: str, needs_input_scale: bool
) -> None:
    scheme = SCHEMES[name]
    assert scheme.weight is weight
    assert scheme.activation == activation
    assert scheme.needs_input_scale is needs_input_scale


def test_every_scheme_is_tested() -> None:
    assert len(SCHEMES) == 7


def test_activation_blocks_match_the_weights() -> None:
    w4a4, block = SCHEMES["nvfp4-w4a4"], SCHEMES["fp8-block"]
    assert w4a4.input is not None
    assert w4a4.weight is not None
    assert w4a4.input.granularity == str(w4a4.weight.block[1])
    assert block.input is not None
    assert block.weight is not None
    assert block.input.granularity == str(block.weight.block[1])
