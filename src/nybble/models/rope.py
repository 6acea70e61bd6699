"""Rotary position embedding: frequencies by `rope_type`, tables by position, positions of images.

Knows configuration keys and numbers, no tensors of a model. Types: default, linear, llama3, yarn,
dynamic (its base form: within the model's own context). Anything else is refused by name.

Source: transformers 5.23 `modeling_rope_utils.py`; interleaved mRoPE and image positions:
`modeling_qwen3_5_moe.py` (spec: Qwen2-VL, section 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.errors import ModelError

TYPES = ("default", "linear", "llama3", "yarn", "dynamic")
Section = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of one model.

    `inverse` is float32 [R / 2], R the rotary dimensions of a head; `scaling` multiplies cosine and
    sine (YaRN). `sections` are the counts of frequencies that follow time, height and width of an
    image, interleaved; () where all positions are one-dimensional.
    """

    inverse: Tensor
    scaling: float
    sections: tuple[int, ...] = ()

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, float32 [T, R / 2], of int64 positions [T], or [3, T] with images."""
        if positions.ndim == 1:
            angles = positions[:, None].float() * self.inverse
        else:
            streams = positions[..., None].float() * self.inverse  # [3, T, R / 2]
            angles = streams[0].clone()
            for axis, count in enumerate(self.sections[1:], start=1):
                angles[:, axis : 3 * count : 3] = streams[axis][:, axis : 3 * count : 3]
        # In double: torch's float32 cosine differs in its last bit by where in a tensor it stands.
        wide = angles.double()
        return (wide.cos() * self.scaling).float(), (wide.sin() * self.scaling).float()


def read_rope(text: Section, head_dim: int) -> Rope:
    """The rotary embedding that config.json describes, in today's or yesterday's spelling.

    Raises ModelError for an unknown type, and for a key that is missing or no number.
    """
    settings = _settings(text)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in TYPES:
        raise ModelError(
            f"config.json: rope_type {kind!r} is not known; expected one of {', '.join(TYPES)}. "
            "A wrong rotation would answer fluently and wrongly"
        )
    share = _number(settings, "partial_rotary_factor", text.get("partial_rotary_factor", 1.0))
    dims = int(head_dim * share)
    base = _number(settings, "rope_theta", text.get("rope_theta", 10_000.0))
    if dims % 2 or not 0 < dims <= head_dim:
        raise ModelError(
            f"config.json: partial_rotary_factor {share:g} of head_dim {head_dim} makes {dims} "
            "rotary dimensions, expected an even number of at most head_dim"
        )
    inverse = 1.0 / (base ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims))
    scaling = 1.0
    if kind == "linear":
        inverse = inverse / _number(settings, "factor")
    elif kind == "llama3":
        inverse = _llama3(inverse, settings)
    elif kind == "yarn":
        inverse, scaling = _yarn(inverse, base, dims, settings, text)
    return Rope(inverse, scaling, _sections(settings, dims))


def image_positions(
    is_image: Sequence[bool], grids: Sequence[tuple[int, int, int]], merge: int
) -> tuple[Tensor, int]:
    """Positions int64 [3, T] of a prompt with images, and the offset of what is generated.

    `is_image` marks the tokens that stand for image patches; `grids` are (time, height, width) of
    each image in patches, in order, `merge` patches a token in each direction. Text advances all
    three streams by one; an image takes t = p, h = p + row, w = p + column, and the next position
    is p + max(rows, columns). A later token at index i has position i + offset.

    Raises ModelError where marks and grids do not fit.
    """
    found: list[Tensor] = []
    at = i = 0
    images = iter(grids)
    while i < len(is_image):
        if not is_image[i]:
            found.append(torch.full((3, 1), at, dtype=torch.int64))
            at, i = at + 1, i + 1
            continue
        grid = next(images, None)
        if grid is None:
            raise ModelError(f"token {i} begins an image, but only {len(grids)} grids were given")
        time, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
        count = time * rows * columns
        if not all(is_image[i : i + count]) or i + count > len(is_image):
            raise ModelError(
                f"the image at token {i} has a grid of {time} x {rows} x {columns} = {count} "
                "tokens, and fewer are marked"
            )
        t, h, w = (
            g.reshape(-1)
            for g in torch.meshgrid(
                torch.arange(time), torch.arange(rows), torch.arange(columns), indexing="ij"
            )
        )
        found.append(torch.stack([t + at, h + at, w + at]))
        at, i = at + max(rows, columns), i + count
    if next(images, None) is not None:
        raise ModelError(f"{len(grids)} image grids were given, and fewer images are marked")
    positions = torch.cat(found, dim=1) if found else torch.zeros((3, 0), dtype=torch.int64)
    last = int(positions.max()) + 1 if positions.numel() else 0
    return positions, last - len(is_image)


def _settings(text: Section) -> Section:
    for key in ("rope_parameters", "rope_scaling"):
        found = text.get(key)
        if isinstance(found, Mapping):
            nested = [k for k, v in found.items() if isinstance(v, Mapping)]
            if nested:
                raise ModelError(
                    f"config.json: {key}.{nested[0]} is an object: a rotary embedding for each "
                    "kind of layer is not implemented"
                )
            return found
        if found is not None:
            raise ModelError(f"config.json: {key} must be an object, found {found!r}")
    return {}


def _number(settings: Section, key: str, default: object = None) -> float:
    value = settings.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        found = "is missing" if value is None else f"is {value!r}"
        raise ModelError(f"config.json: rope {key} {found}, expected a positive number")
    return float(value)


def _sections(settings: Section, dims: int) -> tuple[int, ...]:
    found = settings.get("mrope_section")
    if found is None:
        return ()
    if not isinstance(found, list) or len(found) != 3 or not all(type(n) is int for n in found):
        raise ModelError(f"config.json: mrope_section must be three integers, found {found!r}")
    if sum(found) != dims // 2:
        raise ModelError(
            f"config.json: mrope_section {found} sums to {sum(found)}, expected {dims // 2}, half "
            "the rotary dimensions"
        )
    if settings.get("mrope_interleaved") is False:
        raise ModelError(
            "config.json: mrope_interleaved false: sections in blocks are not implemented"
        )
    return tuple(found)


def _llama3(inverse: Tensor, settings: Section) -> Tensor:
    factor = _number(settings, "factor")
    low, high = _number(settings, "low_freq_factor"), _number(settings, "high_freq_factor")
    context = _number(settings, "original_max_position_embeddings")
    wave = 2 * math.pi / inverse
    smooth = (context / wave - low) / (high - low)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    scaled = torch.where(wave > context / low, inverse / factor, inverse)
    is_between = ~(wave < context / high) & ~(wave > context / low)
    return torch.where(is_between, blended, scaled)


def _yarn(
    inverse: Tensor, base: float, dims: int, settings: Section, text: Section
) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071), section 3: interpolate low frequencies, keep high ones."""
    context = _number(settings, "original_max_position_embeddings")
    longest = text.get("max_position_embeddings")
    ratio = longest / context if isinstance(longest, (int, float)) else None
    factor = _number(settings, "factor", ratio)
    fast, slow = _number(settings, "beta_fast", 32), _number(settings, "beta_slow", 1)

    def boundary(rotations: float) -> float:
        return dims * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = boundary(fast), boundary(slow)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dims // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    found = inverse / factor * ramp + inverse * (1 - ramp)
    return found, _yarn_scaling(factor, settings)


def _yarn_scaling(factor: float, settings: Section) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if settings.get("attention_factor") is not None:
        return _number(settings, "attention_factor")
    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return scale(_number(settings, "mscale")) / scale(_number(settings, "mscale_all_dim"))
    return scale(1.0)
