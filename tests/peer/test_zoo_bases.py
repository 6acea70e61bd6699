"""The folders of the zoo that foreign tools made are what those tools make today."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peer_harness import Peer, need

from folder import Folder
from make_clean import PEERS

pytestmark = pytest.mark.peer

ZOO = Path(__file__).parents[2] / "zoo"
# Without calibration: sums of a forward pass depend on the number of threads.
CASES = [name for name, (_, words) in PEERS.items() if "--calibrate" not in words]


@pytest.mark.parametrize("name", CASES)
def test_the_tool_makes_the_same_tensors(name: str, peer: Peer, tmp_path: Path) -> None:
    (environment, runner), (model, recipe, *options) = PEERS[name]
    need(environment)
    out = tmp_path / "out"
    source = ZOO / "clean" / model
    (row,) = peer(environment, runner.removesuffix(".py"), source, out, recipe, *options)
    assert row["ok"], row
    made, kept = Folder.read(out), Folder.read(ZOO / name)
    assert made.shard_of == kept.shard_of
    assert made.tensors.keys() == kept.tensors.keys()
    for tensor, values in kept.tensors.items():
        assert made.tensors[tensor].dtype == values.dtype
        assert made.tensors[tensor].tobytes() == values.tobytes()
    assert json.loads(made.files["config.json"]) == json.loads(kept.files["config.json"])
