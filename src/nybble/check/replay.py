"""Rules about what each engine would make of the checkpoint (NB6xx).

Every engine is replayed, or the one that was asked for. Asked for, what it refuses or builds
wrongly is an error. Else a refusal is a note, since a file is made for some engines and not for
others, and what an engine builds wrongly without a word is a warning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nybble.check.engines import Replay
from nybble.check.engines.spellings import SPELLINGS
from nybble.check.replay_modules import (
    TITLES,
    asked,
    faults,
    is_mixed_file,
    replays,
    title,
    unread_words,
)
from nybble.check.rule import Finding, Look, Rule, Severity
from nybble.check.survey import Survey

_VLLM = "https://github.com/vllm-project/vllm/issues/"
_SGLANG = "https://github.com/sgl-project/sglang/issues/"
_TRTLLM = "https://github.com/NVIDIA/TensorRT-LLM/issues/"
_LLAMACPP = "https://github.com/ggml-org/llama.cpp/"
#: Engines with FP4 kernels: how these run a file should not depend on which of them it is.
_SERVERS = ("vllm", "sglang", "trtllm")


def _level(survey: Survey, is_silent: bool = False) -> Severity:
    if survey.engine:
        return Severity.ERROR
    return Severity.WARNING if is_silent else Severity.NOTE


# ----------------------------------------------------------------------------------------- refusals


def _look_refused(survey: Survey) -> Iterator[Finding]:
    found = replays(survey)
    words = {} if is_mixed_file(survey) else unread_words(survey)
    for replay in found.values():
        reasons = [
            reason
            for reason in replay.refusals
            if not _is_about_groups(replay, reason)
            and not any(word in reason for word in words.get(replay.engine, ()))
        ]
        if reasons:
            yield REFUSED.finding(
                f"{title(replay)} refuses this: {'; '.join(reasons)}",
                engine=replay.engine,
                severity=_level(survey),
                reasons=reasons,
            )
    if len(found) > 1 and all(replay.refusals for replay in found.values()):
        first = "; ".join(f"{title(r)}: {r.refusals[0]}" for r in found.values())
        yield REFUSED.finding(f"no engine loads this. {first}", engines=list(found))


def _is_about_groups(replay: Replay, reason: str) -> bool:
    return replay.engine == "llamacpp" and "multiple config groups" in reason


def _look_groups(survey: Survey) -> Iterator[Finding]:
    for replay in replays(survey).values():
        for reason in replay.refusals:
            if _is_about_groups(replay, reason):
                yield GROUPS.finding(
                    f"{title(replay)} refuses mixed compressed-tensors: {reason}",
                    engine=replay.engine,
                    severity=_level(survey),
                )


# ------------------------------------------------------------------------------------------- words


def _look_words(survey: Survey) -> Iterator[Finding]:
    is_mixed = is_mixed_file(survey)
    for name, words in unread_words(survey).items():
        replay = replays(survey)[name]
        for word, modules in words.items():
            place = " per layer" if is_mixed else ""
            known, since = SPELLINGS[name].words(is_mixed, replay.version, word)
            yield WORDS.finding(
                f"{title(replay)} does not read quant_algo {word!r}{place}: {len(modules)} "
                f"modules are declared so, the first {modules[0]}; expected one of "
                f"{', '.join(known) or 'none'}{since and f', or version {since}'}",
                modules,
                engine=name,
                severity=_level(survey),
                spelling=word,
            )


def _reporting(rule_id: str) -> Look:
    def look(survey: Survey) -> Iterator[Finding]:
        for fault in faults(survey, rule_id):
            level = _level(survey, fault.first.is_silent)
            if rule_id == "NB611" and not survey.engine:
                level = Severity.NOTE  # the fault is the engine's
            yield _BY_ID[rule_id].finding(
                fault.message,
                fault.modules,
                engine=fault.replay.engine,
                severity=level,
                says=fault.first.says,
                holds=fault.first.holds,
                builds=fault.first.builds,
            )

    return look


# -------------------------------------------------------------------------------------- how it runs


def _look_runs(survey: Survey) -> Iterator[Finding]:
    for replay in replays(survey).values() if survey.engine else ():
        packed = [b for b in replay.built if b.builds == "nvfp4" and not b.problem]
        plain = [b for b in packed if b.runs_as != "W4A4"]
        if plain and not replay.refusals:
            runs_as = plain[0].runs_as
            yield RUNS.finding(
                f"{title(replay)} runs {sum(b.count for b in plain)} of "
                f"{sum(b.count for b in packed)} NVFP4 modules as {runs_as}, the first "
                f"{plain[0].modules[0]}: only the weights are in four bits, and FP4 tensor cores "
                "are not used",
                [m for b in plain for m in b.modules],
                engine=replay.engine,
                runs_as=runs_as,
            )


def _look_runs_differ(survey: Survey) -> Iterator[Finding]:
    if survey.engine:
        return
    found = [r for name, r in replays(survey).items() if name in _SERVERS and not r.refusals]
    differ = []
    for module in dict.fromkeys(m for r in found for m in r.by_module):
        runs = [r.by_module[module] for r in found if module in r.by_module]
        sound = {b.runs_as for b in runs if b.builds == "nvfp4" and not b.problem}
        if len(sound) > 1:
            differ.append(module)
    if differ:
        first = "; ".join(
            f"{title(r)} {b.runs_as}" for r in found if (b := r.by_module.get(differ[0]))
        )
        yield RUNS_DIFFER.finding(
            f"{len(differ)} modules or stacks of experts run differently, the first {differ[0]}: "
            f"{first}",
            differ,
            engines=[r.engine for r in found],
        )


def _look_parallel(survey: Survey) -> Iterator[Finding]:
    ranks = survey.tensor_parallel
    if ranks < 2:
        return
    for engine, _ in asked(survey):
        unfit = engine.unfit(survey, ranks)
        if unfit:
            yield PARALLEL.finding(
                f"{TITLES[engine.name]} cannot divide {len(unfit)} modules over {ranks} ranks, "
                f"the first {unfit[0].module}: {unfit[0].reason}",
                [u.module for u in unfit],
                engine=engine.name,
                severity=Severity.ERROR if survey.engine else Severity.WARNING,
                tensor_parallel=ranks,
            )


# -------------------------------------------------------------------------------------------- rules


def _rule(
    id_: str,
    name: str,
    texts: tuple[str, str, str],
    threads: Iterable[str],
    look: Look | None = None,
) -> Rule:
    summary, explanation, fix = texts
    return Rule(
        id_,
        name,
        Severity.NOTE if id_ in ("NB603", "NB609", "NB611") else Severity.ERROR,
        summary,
        explanation,
        fix,
        look or _reporting(id_),
        threads=tuple(threads),
    )


REFUSED = _rule(
    "NB601",
    "engine-refuses",
    (
        "An engine refuses the checkpoint",
        "The engine's loader stops at the configuration or at the names of tensors, before it "
        "reads one. It is an error if that engine was asked for, or if none is left that "
        "loads the file; else a note, since most files are made for some engines and not for "
        "all.",
        "Convert to a layout that the engine reads, or take one of the other engines.",
    ),
    (f"{_VLLM}37854", "https://github.com/huggingface/transformers/issues/46772"),
    _look_refused,
)
MISBUILT = _rule(
    "NB602",
    "module-misbuilt",
    (
        "An engine builds a module as something else than the file holds",
        "The engine matches names, exclusions and targets by rules of its own, and so makes "
        "another module than the file has tensors for. Loading stops at a shape, or the bytes "
        "land in a parameter of another meaning without a word, and answers are fluent "
        "nonsense.",
        "Correct the names, exclusions or targets that the message speaks of: `nybble repair`.",
    ),
    (f"{_SGLANG}36596", f"{_VLLM}54367", f"{_SGLANG}24927"),
)
RUNS = _rule(
    "NB603",
    "runs-as",
    (
        "NVFP4 weights are not run with FP4 activations",
        "Weight-only NVFP4 halves memory and bandwidth, but the matmul is computed in BF16 "
        "(or int8, in llama.cpp): FP4 tensor cores stay idle, and prefill is about as fast as "
        "FP8. So it is with files that declare W4A16, and with any file on hardware without "
        "FP4.",
        "None needed. For FP4 tensor cores, quantize with a recipe that has W4A4 experts.",
    ),
    (f"{_VLLM}31085", f"{_VLLM}47749"),
    _look_runs,
)
SHAPES = _rule(
    "NB604",
    "shape-unfit",
    (
        "N or K does not suit an engine's kernels",
        "Engines need K in whole blocks: 16 for NVFP4, 128 for block FP8, and 64 for NVFP4 in "
        "GGUF, where four blocks make a superblock.",
        "Leave these modules in BF16.",
    ),
    (f"{_VLLM}43562",),
)
PARALLEL = _rule(
    "NB605",
    "tensor-parallel-unfit",
    (
        "Modules cannot be divided over so many ranks",
        "Tensor parallelism divides N of most linears and K of o_proj and down_proj. Every "
        "rank needs whole blocks, whole heads, and of experts whole tiles.",
        "Take fewer ranks, or expert parallelism.",
    ),
    (f"{_VLLM}54178", f"{_VLLM}42384"),
    _look_parallel,
)
WORDS = _rule(
    "NB606",
    "spelling-unknown",
    (
        "An engine version does not read a quant_algo",
        "Engines know some of ModelOpt's algorithms, and fewer of them per layer than for a "
        "whole file. One that they do not know is refused, or the module is built "
        "unquantized: then loading stops at an unknown scale, or FP8 bytes are read as BF16 "
        "weights.",
        "Take a newer version of the engine, or another algorithm for these modules.",
    ),
    (f"{_VLLM}54367", f"{_VLLM}37854"),
    _look_words,
)
SCHEMES = _rule(
    "NB607",
    "fused-schemes-differ",
    (
        "Projections that engines fuse have different schemes",
        "q, k and v, gate and up, in_proj_qkv and in_proj_z run as one matmul, which has one "
        "scheme. Engines that fuse them raise, or take the first one's scheme for all.",
        "Quantize all members of a fused group alike.",
    ),
    (f"{_SGLANG}35797",),
)
UNFILLED = _rule(
    "NB608",
    "missing-tensors-silent",
    (
        "Parameters that no tensor fills, without a word",
        "The engine makes a parameter for a scale or a weight that the file lacks, and "
        "computes with whatever it was made with: zeros, NaN or random numbers. vLLM looks "
        "for unfilled parameters only in unquantized models.",
        "Restore the tensors from the source, or quantize again: `nybble repair`.",
    ),
    (f"{_VLLM}45212",),
)
RUNS_DIFFER = _rule(
    "NB609",
    "run-as-differs",
    (
        "Engines run the same file differently",
        "The file says weight-only and holds input scales too, or the other way round, and "
        "engines make different things of that: W4A4 in one, W4A16 in another. Speed and "
        "answers differ, and what was measured in one does not hold in the other.",
        "Drop residual input scales of weight-only modules: `nybble repair`.",
    ),
    (f"{_TRTLLM}15680",),
    _look_runs_differ,
)
DRAFT = _rule(
    "NB610",
    "mtp-misbuilt",
    (
        "The draft model is built as something else than the file holds",
        "Engines load the MTP head as a second model, with the same configuration. If its "
        "exclusions name the head only in part, it is built quantized while the file holds "
        "BF16, or the reverse: loading with speculative decoding fails, or drafts are never "
        "accepted.",
        "Exclude all of it with one entry: mtp* (ModelOpt) or re:^mtp.* (compressed-tensors).",
    ),
    (f"{_VLLM}38650", f"{_VLLM}53387", f"{_SGLANG}35797"),
)
EXPERTS = _rule(
    "NB611",
    "experts-lose-scale",
    (
        "transformers decodes NVFP4 experts without their tensor scale",
        "transformers stacks the experts while it reads them, and leaves weight_global_scale "
        "out: the weights are off by a factor of hundreds or thousands, without a word. The "
        "file is sound. Seen in 5.20 and 5.23.",
        "Evaluate with another engine, or convert to BF16 for transformers: `nybble convert`.",
    ),
    ("https://github.com/huggingface/transformers/issues/48371",),
)
GROUPS = _rule(
    "NB612",
    "gguf-mixed-groups",
    (
        "llama.cpp refuses compressed-tensors with several groups",
        "The converter handles one group, or several that are all packed NVFP4. NVFP4 beside "
        "FP8 is refused in this layout, while ModelOpt's MIXED_PRECISION converts.",
        "Convert to ModelOpt's layout first, or write GGUF with `nybble convert --to gguf`.",
    ),
    (f"{_LLAMACPP}pull/28636",),
    _look_groups,
)
RULES: tuple[Rule, ...] = (
    REFUSED,
    MISBUILT,
    RUNS,
    SHAPES,
    PARALLEL,
    WORDS,
    SCHEMES,
    UNFILLED,
    RUNS_DIFFER,
    DRAFT,
    EXPERTS,
    GROUPS,
)
_BY_ID: dict[str, Rule] = {rule.id: rule for rule in RULES}
