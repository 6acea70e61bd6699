"""Which engine reads which `quant_algo`, and since which version.

ModelOpt's words. A uniform file has one for all; a MIXED_PRECISION file one per entry of
`quantized_layers`, and engines know fewer of those. Rows say what the replays in this package do;
where they differ, the replays count. compressed-tensors has no such words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nybble.check.engines.replayed import is_before


@dataclass(frozen=True, slots=True)
class Reads:
    """One engine. `uniform` and `per_layer`: spelling -> first version, "" for all replayed ones.

    `is_exact`: capitals count.
    """

    uniform: Mapping[str, str]
    per_layer: Mapping[str, str]
    is_exact: bool = False

    def knows(self, spelling: str, is_mixed: bool, version: str) -> bool:
        """Whether this version reads the word, as the only one or as one of several."""
        table = self.per_layer if is_mixed else self.uniform
        word = spelling if self.is_exact else spelling.upper()
        return word in table and not is_before(version, table[word])

    def words(self, is_mixed: bool, version: str, spelling: str) -> tuple[list[str], str]:
        """The words that a version reads, and the version that reads `spelling` ("" for none)."""
        table = self.per_layer if is_mixed else self.uniform
        known = [word for word in sorted(table) if not is_before(version, table[word])]
        return known, table.get(spelling if self.is_exact else spelling.upper(), "")


_TRT_LLM = (
    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES", "NVFP4", "W4A16_NVFP4", "NVFP4_AWQ"),
    *("W4A8_NVFP4_FP8", "MXFP8", "W4A16_AWQ", "W4A8_AWQ"),
)

#: Engines that read ModelOpt's files. transformers does not; llama.cpp looks at tensors.
SPELLINGS: dict[str, Reads] = {
    "vllm": Reads(
        uniform={
            "FP8": "",
            "FP8_PER_CHANNEL_PER_TOKEN": "",
            "FP8_PB_WO": "",
            "MXFP8": "",
            "NVFP4": "",
            "W4A16_NVFP4": "0.21.0",
        },
        per_layer={
            "FP8": "0.17.0",
            "NVFP4": "0.17.0",
            "W4A16_NVFP4": "0.22.0",
            "MXFP8": "0.25.0",
            "FP8_PER_CHANNEL_PER_TOKEN": "0.30.0",
            "FP8_PB_WO": "0.30.0",
            "FP8_BLOCK_SCALES": "0.30.0",  # experts
        },
    ),
    "sglang": Reads(
        uniform={
            "FP8": "",
            "NVFP4": "",
            "MXFP8": "",
            "NVFP4_AWQ": "0.5.17",
            "W4A16_NVFP4": "0.5.19",
        },
        per_layer={
            "FP8": "0.5.15",
            "NVFP4": "0.5.15",
            "W4A16_NVFP4": "0.5.15",
            "MXFP8": "0.5.17",
            "FP8_PB_WO": "0.5.18",  # experts since 0.5.21
            "FP8_BLOCK_SCALES": "0.5.20",
        },
    ),
    "trtllm": Reads(
        uniform=dict.fromkeys((*_TRT_LLM, "fp8_pb_wo"), ""),
        per_layer=dict.fromkeys(_TRT_LLM, ""),
        is_exact=True,
    ),
}
