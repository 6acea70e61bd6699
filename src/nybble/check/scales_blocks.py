"""Rules about block scales: bytes that are NaN, signed, zero, or at the end of the range."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nybble.check.contents import CODES, Module
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.scales_scan import indices, scan_of
from nybble.check.survey import Survey

#: Of the block scales of a tensor, the share at 448 that no quantizer leaves, and the mean square
#: of the codes in these blocks (at most 36) that says that their weights were clipped: sound blocks
#: of normal or uniform weights have 9 to 13, those clipped at half their size 20 and more.
SATURATED_SHARE, CLIPPED_ENERGY = 0.05, 16.0
#: Fewer blocks say nothing about a share.
FEWEST_BLOCKS = 128
#: Lost blocks beyond this share of a tensor are more than underflow.
LOST_SHARE = 0.01
_LARGEST = 448.0


def _nan_bytes(survey: Survey) -> Iterator[Finding]:
    blocks = scan_of(survey).blocks
    bad = indices(blocks.column("nan") > 0)
    if len(bad):
        first = bad[0]
        count, of = (int(blocks.column(c)[first]) for c in ("nan", "size"))
        spelled = "0x7F or 0xFF" if blocks.infos[first].dtype == "F8_E4M3" else "0xFF"
        yield NAN_BYTES.finding(
            f"{len(bad):,} tensors of block scales ({blocks.looked}) hold NaN bytes "
            f"({spelled}), the first {blocks.infos[first].name} with {count:,} in {of:,}: expected "
            "none",
            [blocks.infos[i].name for i in bad],
            file=blocks.infos[first].file,
            count=len(bad),
            bytes=int(blocks.column("nan").sum()),
        )


def _signs(survey: Survey) -> Iterator[Finding]:
    blocks = scan_of(survey).blocks
    # 0xFF, NaN with a sign, is the other rule's; at most all NaN bytes are of that kind.
    signed = blocks.column("negative") - blocks.column("nan")
    bad = indices(signed > 0)
    if len(bad):
        first = bad[0]
        yield SIGN_BITS.finding(
            f"{len(bad):,} tensors of block scales ({blocks.looked}) hold bytes with the "
            f"sign bit set, the first {blocks.infos[first].name} with {int(signed[first]):,} in "
            f"{int(blocks.column('size')[first]):,}: expected 0x00 to 0x7E",
            [blocks.infos[i].name for i in bad],
            file=blocks.infos[first].file,
            count=len(bad),
            bytes=int(signed[bad].sum()),
        )


# -------------------------------------------------------------------------------- zero block scales


def _zero_blocks(survey: Survey) -> Iterator[Finding]:
    blocks = scan_of(survey).blocks
    zero, size = blocks.column("zero"), blocks.column("size")
    is_whole = (zero == size) & (size > 0)
    # All zeros under scale 0 decode as they should, if there are few such tensors.
    idle_whole = is_whole & np.array([_is_idle(survey, m) for m in blocks.modules], dtype=bool)
    if 10 * int(idle_whole.sum()) > len(size):
        idle_whole[:] = False
    whole = indices(is_whole & ~idle_whole)
    if len(whole):
        info = blocks.infos[whole[0]]
        yield ZERO_BLOCKS.finding(
            f"all block scales of {len(whole):,} tensors ({blocks.looked}) are 0, the "
            f"first {info.name}: expected positive ones; its weights decode to zeros",
            [blocks.infos[i].name for i in whole],
            file=info.file,
            count=len(whole),
        )
    lost: list[tuple[int, int]] = []
    idle: list[tuple[int, int]] = []
    for i in indices((zero > 0) & (~is_whole | idle_whole)):
        live = _lost_blocks(survey, blocks.modules[i])
        (lost if live else idle).append((int(i), live))
    if lost:
        first, live = lost[0]
        shares = [live / int(size[i]) for i, live in lost]
        severity = Severity.ERROR if max(shares) > LOST_SHARE else Severity.WARNING
        yield ZERO_BLOCKS.finding(
            f"{len(lost):,} tensors ({blocks.looked}) have blocks with scale 0 and codes "
            f"that are not, the first {blocks.infos[first].name} with {live:,} of "
            f"{int(size[first]):,} blocks, up to {max(shares):.2%}: expected at least 2^-9; the "
            "weights of these blocks are lost",
            [blocks.infos[i].name for i, _ in lost],
            file=blocks.infos[first].file,
            severity=severity,
            count=len(lost),
            blocks=sum(live for _, live in lost),
            max_share=max(shares),
        )
    if idle:
        first, _ = idle[0]
        yield ZERO_BLOCKS.finding(
            f"{len(idle):,} tensors ({blocks.looked}) have blocks with scale 0 whose "
            f"codes are all zero, the first {blocks.infos[first].name} with {int(zero[first]):,} "
            f"of {int(size[first]):,}: harmless",
            [blocks.infos[i].name for i, _ in idle],
            file=blocks.infos[first].file,
            severity=Severity.NOTE,
            count=len(idle),
        )


def _is_idle(survey: Survey, module: Module) -> bool:
    """An expert whose codes are all zero under a sound tensor scale, as far as looked at."""
    if ".experts." not in module.name or module.name not in scan_of(survey).zero_codes:
        return False
    at = scan_of(survey).tops.by_module.get(module.name)
    return at is None or bool(scan_of(survey).tops.stored[at] != 0)


def _lost_blocks(survey: Survey, module: Module) -> int:
    """Blocks with scale 0 and a code that is not, of what was looked at."""
    if not survey.deep:
        sampled = {s.module.name: s for s in scan_of(survey).sampled}.get(module.name)
        return 0 if sampled is None else int(((sampled.scales == 0) & (sampled.energy > 0)).sum())
    scales, codes = module.tensor("weight_scale"), module.tensor(*CODES)
    if scales is None or codes is None or codes.nbytes % max(scales.nbytes, 1):
        return 0
    per_block, step, lost = codes.nbytes // scales.nbytes, 1 << 20, 0
    for at in range(0, scales.nbytes, step):
        n = min(step, scales.nbytes - at)
        some = np.frombuffer(survey.files.read(scales.file, scales.offset + at, n), np.uint8)
        zero = np.flatnonzero((some & 0x7F) == 0 if scales.dtype == "F8_E4M3" else some == 0)
        if zero.size:
            data = survey.files.read(codes.file, codes.offset + at * per_block, n * per_block)
            packed = np.frombuffer(data, np.uint8).reshape(n, per_block)[zero]
            lost += int((packed & 0x77).any(axis=1).sum())
    return lost


# --------------------------------------------------------------------------------------- saturation


def _saturated(survey: Survey) -> Iterator[Finding]:
    names, shares, file = [], [], ""
    for s in scan_of(survey).sampled:
        if s.scales.size < FEWEST_BLOCKS or not s.module.kind.held.startswith("nvfp4"):
            continue
        at_end = s.scales == _LARGEST
        share = float(at_end.mean())
        if share <= SATURATED_SHARE or at_end.all():
            continue  # all at the end: a default, not a saturated measurement
        per_weight = float(s.energy[at_end].mean()) / (s.weights / s.scales.size)
        if per_weight > CLIPPED_ENERGY:
            names.append(s.module.name)
            shares.append(share)
            file = file or s.module.tensors[0].file
    if names:
        yield SATURATED.finding(
            f"{len(names):,} modules ({len(scan_of(survey).sampled):,} sampled) have many block "
            f"scales at 448, the end of E4M3, and clipped codes below them, the first {names[0]} "
            f"with {shares[0]:.1%}: expected one block or a few; the tensor scale is too small",
            names,
            file=file,
            count=len(names),
            max_share=max(shares),
        )
    yield from _saturated_fp8(survey)


def _saturated_fp8(survey: Survey) -> Iterator[Finding]:
    codes = scan_of(survey).codes
    is_fp8 = np.array([info.dtype == "F8_E4M3" for info in codes.infos], dtype=bool)
    size = codes.column("size")
    share = codes.column("saturated") / np.maximum(size, 1)
    # Uniform weights have 4 % at the end.
    bad = indices(is_fp8 & (size >= 4096) & (share > 2 * SATURATED_SHARE))
    if len(bad):
        first = codes.infos[bad[0]]
        yield SATURATED.finding(
            f"{len(bad):,} FP8 weights ({codes.looked}) have many values at 448, the "
            f"first {first.name} with {share[bad[0]]:.1%}: expected one or a few per scale; the "
            "scale is too small and weights are clipped",
            [codes.modules[i].name for i in bad],
            file=first.file,
            count=len(bad),
            max_share=float(share[bad].max()),
        )


# ------------------------------------------------------------------------------------ foreign codes


def _foreign_codes(survey: Survey) -> Iterator[Finding]:
    odd, looked, worst = [], 0, 0.0
    for s in scan_of(survey).sampled:
        counts = np.bincount(s.codes[:8192], minlength=256)
        nibbles = counts.reshape(16, 16).sum(axis=0) + counts.reshape(16, 16).sum(axis=1)
        positive, negative = nibbles[1:8], nibbles[9:16]
        total = int(positive.sum() + negative.sum())
        if total < 1024:
            continue
        looked += 1
        skew = float(np.abs(positive - negative).sum()) / total
        if skew > _SKEW:
            odd.append(s.module)
            worst = max(worst, skew)
    # One tensor may well hold weights of one sign; most of a model's do not.
    if odd and 2 * len(odd) > looked:
        yield FOREIGN_CODES.finding(
            f"the codes of {len(odd):,} of {looked:,} sampled modules are no E2M1 codes of "
            f"weights, the first {odd[0].name}: expected about as many of each value as of its "
            f"negative, found {worst:.0%} of them without a partner; it looks like integers, or "
            "another packing",
            [m.name for m in odd],
            file=odd[0].tensors[0].file,
            count=len(odd),
            max_skew=worst,
        )


#: Share of codes without a partner of the other sign. Weights have below 0.1; integers with an
#: offset, and those in two's complement, above 0.8.
_SKEW = 0.5

_VALUES = frozenset({"values"})
_UNDERFLOW = "https://github.com/NVIDIA/Model-Optimizer/pull/1382"

NAN_BYTES = Rule(
    "NB205",
    "nan-block-scale",
    Severity.ERROR,
    "Block scales hold NaN bytes",
    "0x7F and 0xFF are the NaN of E4M3 (0xFF of E8M0). llama.cpp decodes such a block to zeros, "
    "all other engines to NaN, which spreads to every output of the module. A cast that was not "
    "clamped to 448 makes them.",
    "Requantize the modules named.",
    _nan_bytes,
    ("https://github.com/vllm-project/compressed-tensors/issues/832",),
    needs=_VALUES,
)
SIGN_BITS = Rule(
    "NB206",
    "signed-block-scale",
    Severity.ERROR,
    "Block scales have the sign bit set",
    "A scale is a magnitude. Marlin kernels and llama.cpp drop the sign of block scales, others "
    "honour it: the block's weights have one sign here and the other there.",
    "`nybble repair` moves the sign into the block's codes, which changes no value.",
    _signs,
    is_repairable=True,
    needs=_VALUES,
)
ZERO_BLOCKS = Rule(
    "NB207",
    "zero-block-scale",
    Severity.ERROR,
    "Block scales are zero",
    "A block with scale 0 decodes to zeros whatever its codes say. Block scales below 2^-9 "
    "become 0 if a quantizer does not clamp them; these blocks were small, and a few are a "
    "warning. More than 1 % of a tensor, or all of it, is an error: the weights are gone, or the "
    "file was not downloaded whole. Blocks of zeros that carry scale 0 are a note: sound tools "
    "write 1 or 0.125 there.",
    "Requantize with clamped block scales, or download the shard again.",
    _zero_blocks,
    (_UNDERFLOW,),
    needs=_VALUES,
)
SATURATED = Rule(
    "NB215",
    "saturated-scales",
    Severity.WARNING,
    "Scales are at the end of their range and weights clipped",
    "With a sound tensor scale the largest block has the largest block scale, 448, and few "
    "others have. Where many blocks sit at 448 and their codes at 6, the tensor scale was too "
    "small for the weights, and all large ones were clipped to one value. Likewise FP8 weights "
    "at 448.",
    "Requantize with the largest magnitude of the whole weight.",
    _saturated,
    needs=_VALUES,
)
FOREIGN_CODES = Rule(
    "NB220",
    "codes-not-e2m1",
    Severity.WARNING,
    "The codes are not E2M1",
    "Weights are about symmetric, so each E2M1 code is about as frequent as that of the other "
    "sign. Four-bit integers, with an offset of 8 or in two's complement, in the same packing "
    "and under the same names break this thoroughly: read as E2M1 they give noise of the right "
    "size.",
    "Find what wrote the codes, and declare or requantize accordingly.",
    _foreign_codes,
    needs=_VALUES,
)

RULES = (NAN_BYTES, SIGN_BITS, ZERO_BLOCKS, SATURATED, FOREIGN_CODES)
