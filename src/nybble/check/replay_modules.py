"""What the replays say, sorted by the rules that report it.

Every engine is replayed once, or the one that was asked for. A fault of a module belongs to one
rule, and modules that fail alike in one engine are one fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from nybble.check.contents import Module
from nybble.check.engines import Built, Engine, Replay, engines, find_engine
from nybble.check.engines.matching import find_units
from nybble.check.engines.spellings import SPELLINGS
from nybble.check.engines.transformers import LOST_SCALE
from nybble.check.survey import Survey
from nybble.checkpoint.modelopt import CONFIG_FILE

TITLES = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "trtllm": "TensorRT-LLM",
    "llamacpp": "llama.cpp",
    "transformers": "transformers",
}


def asked(survey: Survey) -> list[tuple[Engine, str]]:
    """The engine that was asked for with its version, or all at their newest."""
    if not survey.engine:
        return [(engine, "") for engine in engines().values()]
    engine, version = find_engine(survey.engine)
    return [(engine, survey.engine_version or version)]


def replays(survey: Survey) -> dict[str, Replay]:
    """What the engines asked for make of a checkpoint, by name; made once."""
    return survey.once(_replay)


def _replay(survey: Survey) -> dict[str, Replay]:
    return {
        engine.name: engine.replay(survey, version, survey.hardware)
        for engine, version in asked(survey)
    }


def title(replay: Replay) -> str:
    return f"{TITLES[replay.engine]} {replay.version}"


# ------------------------------------------------------------------------------------------- words


def declared_words(survey: Survey) -> dict[str, list[str]]:
    """ModelOpt's word for every quantized linear, or container of experts -> their names."""
    found: dict[str, list[str]] = {}
    if survey.declaration.layout != "modelopt":
        return found
    for unit in find_units(survey):
        for member in unit.members:
            if member.declared is not None and member.kind.is_quantized:
                name = unit.path if unit.sort == "experts" else member.name
                found.setdefault(member.declared.spelling, []).append(name)
    return {word: list(dict.fromkeys(names)) for word, names in found.items()}


def is_mixed_file(survey: Survey) -> bool:
    return any(
        isinstance(section, dict) and section.get("quant_algo") == "MIXED_PRECISION"
        for section in (
            survey.config.get("quantization_config"),
            survey.documents.get(CONFIG_FILE, {}).get("quantization"),
        )
    )


def unread_words(survey: Survey) -> dict[str, dict[str, list[str]]]:
    """Engine -> words that its version does not read -> the modules they stand for."""
    declared, is_mixed = declared_words(survey), is_mixed_file(survey)
    found: dict[str, dict[str, list[str]]] = {}
    for engine, version in asked(survey):
        reads = SPELLINGS.get(engine.name)
        is_beside_the_point = is_mixed and replays(survey)[engine.name].refusals
        if reads is not None and not is_beside_the_point:
            found[engine.name] = {
                word: modules
                for word, modules in declared.items()
                if not reads.knows(word, is_mixed, version)
            }
    return found


# ----------------------------------------------------------------------------------------- modules


def rule_of(built: Built, survey: Survey) -> str:
    """The rule that reports a module which is built wrongly, or not at all."""
    problem = built.problem
    if any(module.startswith("mtp.") for module in built.modules):
        return "NB610"
    if problem == LOST_SCALE:
        return "NB611"
    if "multiple of" in problem:
        return "NB604"
    if len(built.modules) > 1 and _members_differ(built, survey):
        return "NB607"
    if built.is_silent and re.search(r"missing|never filled|at random", problem):
        return "NB608"
    return "NB602"


def _members_differ(built: Built, survey: Survey) -> bool:
    members = [m for name in built.modules if (m := survey.contents.by_name.get(name))]
    return len({(m.kind.held, _word(m)) for m in members}) > 1


def _word(module: Module) -> str:
    return module.declared.spelling if module.declared else ""


@dataclass(frozen=True, slots=True)
class Fault:
    """Modules of one engine that fail alike."""

    replay: Replay
    built: tuple[Built, ...]

    @property
    def first(self) -> Built:
        return self.built[0]

    @property
    def modules(self) -> list[str]:
        return [module for built in self.built for module in built.modules]

    @property
    def message(self) -> str:
        first, count = self.first, sum(built.count for built in self.built)
        modules = f"{count} modules, the first {first.modules[0]}" if count > 1 else first.name
        return (
            f"{title(self.replay)}: {modules}: the configuration says {first.says or 'nothing'}, "
            f"the file holds {first.holds}, it builds {first.builds or 'nothing'}: {first.problem}"
        )


def faults(survey: Survey, rule: str) -> Iterator[Fault]:
    """The faults that a rule reports, alike ones together; none of an engine that refuses."""
    for replay in replays(survey).values():
        unread = {m for ms in unread_words(survey).get(replay.engine, {}).values() for m in ms}
        alike: dict[tuple[str, ...], list[Built]] = {}
        for built in () if replay.refusals else (*replay.failing, *replay.silent):
            if rule_of(built, survey) == rule and not unread.intersection(built.modules):
                plain = re.sub(r"\d+", "#", built.problem.replace(built.name, ""))
                alike.setdefault((built.says, built.holds, built.builds, plain), []).append(built)
        for group in alike.values():
            yield Fault(replay, tuple(group))
