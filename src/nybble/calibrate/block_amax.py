"""How large the blocks of an input are: a histogram of the largest magnitude of every 16 channels.

Engines make the block scales of NVFP4 inputs at run time, as E4M3 numbers under the one stored
scale; how far apart large and small blocks lie is what that scale has to hold. Bins are eighths of
an octave, so a quantile is right within 9 %, in memory that does not grow with the text.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nybble.errors import RecipeError

BLOCK = 16
#: Bins of an octave, and the octaves that are told apart: what is smaller or larger counts as that.
_FINE, _LOWEST, _HIGHEST = 8, -40, 40


class BlockAmax:
    """Counts of block maxima, zeros left out: a block of zeros is exact under any scale."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros((_HIGHEST - _LOWEST) * _FINE, dtype=np.int64)

    def add(self, maxima: NDArray[np.float32]) -> None:
        """Count the largest magnitudes of blocks, any shape; NaN and infinities are not counted."""
        found = maxima[np.isfinite(maxima) & (maxima > 0)].astype(np.float64)
        bins = np.floor((np.log2(found) - _LOWEST) * _FINE).astype(np.int64)
        bins = bins.clip(0, len(self.counts) - 1)
        self.counts += np.bincount(bins, minlength=len(self.counts))

    @property
    def blocks(self) -> int:
        """How many blocks were counted."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """What a `share` of the blocks does not reach: the lower edge of its bin; 0 where nothing
        was counted. Raises RecipeError for a share that is none."""
        if not 0 <= share <= 1:
            raise RecipeError(f"a quantile of {share}: expected 0 to 1")
        if not self.blocks:
            return 0.0
        # The bin that holds the block after this share of them.
        at = np.searchsorted(self.counts.cumsum(), share * self.blocks, side="right")
        last = int(np.flatnonzero(self.counts)[-1])
        return float(2.0 ** (_LOWEST + min(int(at), last) / _FINE))
