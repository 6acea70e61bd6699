"""What a replay of an engine's loader says: of the whole file, and of every linear it builds.

The types that all engines share, and nothing of any of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nybble.check.survey import Survey


@dataclass(frozen=True, slots=True)
class Built:
    """One linear, fused linear, or the routed experts of one layer, as the engine makes it.

    `name` is the engine's own module path; `modules` those of the file that go into it (of experts
    only their container) and `count` how many they are. `says` is the configuration as this engine
    reads it ("W4A16_NVFP4", "FP8", "unquantized"), `holds` what the file holds (`Kind.held`, if
    several joined by "+"), `builds` what the engine creates ("nvfp4", "fp8", "bf16"), `runs_as` how
    it is computed ("W4A16", "W4A4", "W8A8", "BF16"), "" if it cannot be loaded. `problem` says why
    loading fails or goes wrong, "" if neither; `is_silent`: nothing is raised, answers are wrong.
    """

    name: str
    modules: tuple[str, ...]
    count: int
    says: str
    holds: str
    builds: str
    runs_as: str
    problem: str = ""
    is_silent: bool = False


@dataclass(frozen=True)
class Replay:
    """What one version of one engine makes of a checkpoint.

    `refusals` are reasons why it stops before it looks at a tensor; `notes` what its user should
    know and no module shows.
    """

    engine: str
    version: str
    refusals: tuple[str, ...]
    built: tuple[Built, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def loads(self) -> bool:
        """Nothing is refused and every module can be filled; silent faults do load."""
        return not self.refusals and not any(b.problem and not b.is_silent for b in self.built)

    @cached_property
    def silent(self) -> tuple[Built, ...]:
        """The modules that load and answer wrongly."""
        return tuple(b for b in self.built if b.problem and b.is_silent)

    @cached_property
    def failing(self) -> tuple[Built, ...]:
        """The modules that stop the load."""
        return tuple(b for b in self.built if b.problem and not b.is_silent)

    @cached_property
    def by_module(self) -> Mapping[str, Built]:
        """The linear that each module (or container of experts) of the file goes into."""
        return {module: built for built in self.built for module in built.modules}


@dataclass(frozen=True, slots=True)
class Change:
    """A version of an engine, what is different from it on, and where that is written.

    `since` is "" for a change whose first version no source states.
    """

    since: str
    what: str
    source: str


@dataclass(frozen=True, slots=True)
class Unfit:
    """A module that cannot be divided over so many ranks."""

    module: str
    reason: str


class Engine(Protocol):
    """An engine whose loading rules are known."""

    @property
    def name(self) -> str:
        """As users spell it: "vllm"."""
        ...

    @property
    def oldest(self) -> str:
        """The first version that the rules were read of, or are known for."""
        ...

    @property
    def newest(self) -> str:
        """The version that the rules were read of."""
        ...

    @property
    def changes(self) -> tuple[Change, ...]:
        """What changed between versions, the oldest first."""
        ...

    def replay(self, survey: Survey, version: str = "", hardware: str = "") -> Replay:
        """What this engine makes of a checkpoint; version "" is `newest`, hardware "" is any.

        `hardware` is a compute capability such as "sm90", or "cpu".
        """
        ...

    def unfit(self, survey: Survey, tensor_parallel: int) -> tuple[Unfit, ...]:
        """The modules whose N or K does not divide over that many ranks, each with the reason."""
        ...


_numbers = re.compile(r"\d+").findall


def version_key(version: str) -> tuple[int, ...]:
    """Numbers of a version, comparable: "0.5.12.post1" -> (0, 5, 12, 1), "0.22.0" -> (0, 22), as
    "0.22" is; a release candidate counts as what it is a candidate of."""
    numbers = [int(n) for n in _numbers(re.split(r"rc|a\d|b\d|\.dev|\+", version)[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def is_before(version: str, other: str) -> bool:
    """Whether `version` is older than `other`; "" is the newest."""
    return bool(version) and version_key(version) < version_key(other)


def notes_on_version(engine: Engine, version: str) -> list[str]:
    """A sentence for a version that is newer than the one the rules were read of."""
    if not version or not is_before(engine.newest, version):
        return []
    return [f"{engine.name} {version} is newer than {engine.newest}, which the rules were read of"]
