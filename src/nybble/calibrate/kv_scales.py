"""Scales of keys and values in an FP8 cache: measured per layer, and 1.0 nearly always.

E4M3 is floating point: between 2^-6 and 448 its relative error is the same, so a scale matters only
to what would saturate or vanish. It stays 1.0 unless the largest key (or value) is above 400, or
the median below 2^-5; then it is the power of two that puts the largest at half of 448.

Scales are per tensor and multiply what is stored, as engines have them. NVFP4 caches are not made:
engines are at odds about their scales, and published ones double the divergence of FP8.

Source: NVIDIA ModelOpt's fp8 and fp8_cast caches; docs/calibration.md. Knows no layout: the names
of the tensors are `checkpoint/`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, isfinite, log2

from torch import Tensor

from nybble.calibrate.block_amax import BlockAmax
from nybble.errors import RecipeError
from nybble.formats.element import E4M3
from nybble.kernels.paged_attention import Pages
from nybble.models.state import Batch

#: Above this there is less room up to 448 than other text may need.
MOST_AMAX = 400.0
#: Below this half of all numbers are near E4M3's subnormals (from 2^-6 down).
LEAST_MEDIAN = 2.0**-5
#: What the largest is multiplied by where a scale is made.
HEADROOM = 2.0


@dataclass(slots=True)
class Size:
    """How large the numbers of one kind in one layer are."""

    amax: float = 0.0
    sizes: BlockAmax = field(default_factory=BlockAmax)

    def add(self, x: Tensor) -> None:
        """Count numbers, any shape and float dtype."""
        found = x.float().abs()
        if found.numel():
            largest = float(found.max())
            # A NaN stays: max(NaN, x) would depend on the order.
            self.amax = largest if largest > self.amax or largest != largest else self.amax
            self.sizes.add(found.numpy())

    @property
    def median(self) -> float:
        """Of those that are not zero, within 9 %; 0 where there are none."""
        return self.sizes.quantile(0.5)

    def scale(self) -> float:
        """What these numbers are divided by before they are stored."""
        is_fine = self.amax <= MOST_AMAX and self.median >= LEAST_MEDIAN
        if is_fine or self.amax == 0:
            return 1.0
        return 2.0 ** ceil(log2(HEADROOM * self.amax / E4M3.max))


@dataclass(frozen=True, slots=True)
class KvScale:
    """The scales of one layer, and what they were made of."""

    key: float
    value: float
    key_amax: float
    value_amax: float
    key_median: float
    value_median: float


class KvSizes:
    """Who measures keys and values: shown the pages of each layer after each batch."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Size, Size]] = {}

    def look(self, layer: int, pages: Pages, batch: Batch) -> None:
        """Count what the batch's sequences put into `pages`, float32 or bfloat16.

        Each sequence must have begun with this batch and have one page, as in a stream.
        """
        key, value = self.layers.setdefault(layer, (Size(), Size()))
        counts = (batch.starts[1:] - batch.starts[:-1]).tolist()
        for page, count in zip(batch.table[:, 0].tolist(), counts, strict=True):
            key.add(pages.keys[page, :, :count])
            value.add(pages.values[page, :, :count])

    def scales(self) -> dict[int, KvScale]:
        """By layer, -1 for the MTP head's. Raises RecipeError, naming the layer, for NaN, and where
        nothing was measured."""
        if not self.layers:
            raise RecipeError(
                "no layer of this model keeps keys and values, so there is nothing to scale; leave "
                "--kv-scales out"
            )
        found = {}
        for layer, (key, value) in sorted(self.layers.items()):
            if not (isfinite(key.amax) and isfinite(value.amax)):
                raise RecipeError(
                    f"the keys or values of {'the MTP head' if layer < 0 else f'layer {layer}'} "
                    "are NaN or infinite: a weight before them is damaged (`nybble check` shows "
                    "which)"
                )
            found[layer] = KvScale(
                key.scale(), value.scale(), key.amax, value.amax, key.median, value.median
            )
        return found


def as_json(scales: Mapping[int, KvScale]) -> list[dict[str, object]]:
    """For a report: a row a layer."""
    return [
        {
            "layer": layer,
            "k_scale": s.key,
            "v_scale": s.value,
            "k_amax": s.key_amax,
            "v_amax": s.value_amax,
            "k_median": s.key_median,
            "v_median": s.value_median,
        }
        for layer, s in scales.items()
    ]
