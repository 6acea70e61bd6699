"""The "absmax trap": what an article on NVFP4 argues, from our own codecs, and where it errs.

    python examples/absmax_trap.py

"NVFP4 Is Not What You Think" says: one weight of 12.8 makes absmax scaling round six small ones to
zero, so NVIDIA clips it to 2.0 by least squares and the total error falls. The first half is true.
Least squares, though, gives 12.0 and leaves the six at zero: clipping a large weight costs far more
than small ones are worth. Its gain comes from blocks that it expands towards M = 4, twice as many.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nybble.formats.block import NVFP4
from nybble.formats.element import E4M3, decode
from nybble.formats.search import SEARCHES, block_error, nvfp4_scale_codes, quantize, tensor_scale
from nybble.kernels import block_quantize

F32Array = NDArray[np.float32]
#: The article gives the outlier and says "six small weights"; the other values are ours.
BLOCK = np.array(
    [0.4, -0.3, 0.2, 12.8, -0.5, 0.35, 0.25, 1.1, -0.9, 1.6, -1.3, 0.7, 2.0, -1.8, 1.0, -0.6],
    dtype=np.float32,
)
OUTLIER, CLIPPED = 12.8, 2.0
TOP = tensor_scale(np.float32(OUTLIER), NVFP4, "mse")  # of the tensor, for all three searches
BLOCKS = 1 << 16
BAR = 46


def bar(part: float) -> str:
    return "#" * round(BAR * part)


def one_block() -> None:
    """The article's picture: sixteen values, three searches."""
    print("One block. absmax maps 12.8 to the code 6; the others choose their scale.\n")
    made = {search: quantize(BLOCK[None], NVFP4, search, scale=TOP) for search in SEARCHES}
    values = {search: t.dequantize()[0] for search, t in made.items()}
    print(f"{'weight':>8}" + "".join(f"{search:>10}" for search in SEARCHES))
    for i, weight in enumerate(BLOCK):
        print(f"{weight:8.2f}" + "".join(f"{values[s][i]:10.3f}" for s in SEARCHES))
    print(f"{'scale':>8}" + "".join(f"{made[s].scales()[0, 0]:10.4f}" for s in SEARCHES))
    for label, pick in (("error", slice(None)), ("of 12.8", slice(3, 4))):
        cost = (f"{((values[s] - BLOCK)[pick] ** 2).sum():10.4f}" for s in SEARCHES)
        print(f"{label:>8}" + "".join(cost))
    zeros = {s: int(((values[s] == 0) & (BLOCK != 0)).sum()) for s in SEARCHES}
    print(f"{'zeros':>8}" + "".join(f"{zeros[s]:10d}" for s in SEARCHES))


def error_curve() -> None:
    """Squared error of the block at every scale around, and at the one that clips to 2.0."""
    x = np.repeat(np.abs(BLOCK)[None] / TOP, 126, axis=0)
    scales = decode(np.arange(1, 127, dtype=np.uint8), E4M3)
    errors, outliers = (block_error(part, scales) * float(TOP) ** 2 for part in (x, x[:, 3:4]))
    marks = {s: int(nvfp4_scale_codes(BLOCK[None], TOP[None], s)[0]) for s in SEARCHES}
    clip = int(np.abs(scales * TOP * 6 - CLIPPED).argmin()) + 1
    print("\nSquared error by scale (log), M being 12.8 / scale, the code that 12.8 maps to.\n")
    low, high = np.log10(errors.min()), np.log10(errors[clip - 1])
    for code in sorted({clip, *range(marks["absmax"] - 4, marks["absmax"] + 8)}):
        error = errors[code - 1]
        names = [n for n, c in marks.items() if c == code] + ["the article"] * (code == clip)
        m = OUTLIER / float(scales[code - 1] * TOP)
        length = 0.1 + 0.9 * (np.log10(error) - low) / (high - low)
        print(f"M {m:6.2f} {error:9.3f} {bar(length):<{BAR}} {', '.join(names)}".rstrip())
    best, others = marks["mse"] - 1, errors - outliers
    lost, saved = outliers[clip - 1] - outliers[best], others[best] - others[clip - 1]
    print(
        f"\nClipping 12.8 to 2.0 adds {lost:.1f} there and saves {saved:.1f} on the fifteen others."
    )
    print(
        f"It pays only where the outlier's input has less than 1/{lost / saved:.0f} of the others'"
    )
    print("energy: with weights from activations, never by plain least squares.")


def statistics() -> None:
    """Where the least-squares scale lies from absmax, over Gaussian blocks."""
    x = (np.random.default_rng(0).standard_normal(BLOCKS * 16) * 0.02).astype(np.float32)
    amax = block_quantize.amax([x])
    found: dict[str, NDArray[np.uint8]] = {}
    noise = {}
    for search in SEARCHES:
        top = tensor_scale(amax, NVFP4, search)
        codes, scale = [np.empty(x.size // 2, np.uint8)], [np.empty(BLOCKS, np.uint8)]
        block_quantize.quantize([x], NVFP4, search, top, codes, scale)
        [result] = block_quantize.compare([x], NVFP4, top, codes, scale)
        noise[search], found[search] = result.error / result.energy, scale[0]
    top = np.repeat(tensor_scale(amax, NVFP4, "mse"), BLOCKS)  # the same units for both
    start = nvfp4_scale_codes(x.reshape(-1, 16), top, "absmax").astype(int)
    steps = found["mse"].astype(int) - start
    print(f"\n{BLOCKS} Gaussian blocks: E4M3 steps from absmax's scale to the least-squares one.\n")
    for step in range(steps.min(), steps.max() + 1):
        part = float((steps == step).mean())
        print(f"{step:+d} {100 * part:6.2f} % {bar(part * 2)}".rstrip())
    print(
        f"\nclipped (below 0)          {100 * (steps < 0).mean():5.1f} %, by {-steps.min()} at most"
    )
    print(f"expanded towards M = 4     {100 * (steps >= 3).mean():5.1f} %  (+3 and above)")
    for search in SEARCHES:
        gain = 100 * (1 - noise[search] / noise["absmax"])
        decibels = -10 * np.log10(noise[search])
        print(f"{search:<9} SQNR {decibels:6.2f} dB, {gain:4.1f} % of absmax's noise removed")


if __name__ == "__main__":
    one_block()
    error_curve()
    statistics()
