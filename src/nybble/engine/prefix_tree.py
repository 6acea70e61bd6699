"""What a prefix cache consists of: pages that hang on one another, what was found of a prompt, and
what a living sequence shares. `prefix.PrefixCache` changes them.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

from nybble.errors import EngineError

#: Bytes of a token in the key of a page.
TOKEN_BYTES = array("i").itemsize

#: Why no more of a prompt came from the cache: all came that there is; nothing is cached under this
#: salt; the prompt, or what is cached, ends before the first place where a hit may; what is cached
#: goes on otherwise; what followed was evicted; no snapshot was taken where the pages end, or it
#: was evicted.
Reason = Literal["hit", "empty", "short", "parts", "evicted", "no-snapshot", "evicted-snapshot"]


@dataclass(slots=True, eq=False)
class Node:
    """A full page that is cached: `key` are its tokens as bytes, `end` the tokens from the start of
    the text to its end.

    `users` counts the sequences whose pages include it, and with it all pages before; `snapshot` is
    the slot of the state at its end, read by `pins` sequences now. `has_lost`: it was evicted.
    `evicted` are hashes of pages that came after it. A root has no page and its salt for a key;
    `parent` is None for roots, and for what is no longer cached.
    """

    parent: Node | None = field(repr=False)
    key: bytes = field(repr=False)
    page: int
    end: int
    is_exact: bool
    has_mtp: bool
    users: int = 0
    pins: int = 0
    snapshot: int | None = None
    has_lost: bool = False
    children: dict[bytes, Node] = field(default_factory=dict, repr=False)
    evicted: set[int] = field(default_factory=set, repr=False)


@dataclass(frozen=True, slots=True)
class Hit:
    """What the cache has of a prompt of `asked` tokens: the state after `length`, 0 for nothing.

    It lies in `pages` and in the snapshot `slot`, None where models have no recurrent states or
    nothing was found. `is_exact`: it is bitwise what computing the prompt afresh makes. `has_mtp`:
    the pages hold the entries of the MTP head too. `matched` counts the tokens that are equal to
    cached ones, also those after `length`. `reason` says why there is no more, `ended` the same of
    the pages alone. Good until the cache is asked for memory.
    """

    reason: Reason
    asked: int
    length: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    is_exact: bool = True
    has_mtp: bool = True
    matched: int = 0
    nodes: tuple[Node, ...] = ()
    known: frozenset[int] = frozenset()
    boundaries: Sequence[int] = ()
    ended: Reason = "hit"
    has_states: bool = False

    def explain(self) -> str:
        """Where the prompt leaves what is cached, and what was nearest, in words for a log."""
        if self.reason == "empty":
            return "nothing is cached under this key and salt"
        if self.reason == "short" and not self.matched:
            return f"{self.asked:,} tokens end before the first place where a hit may end"
        text = "parts at" if self.ended == "parts" else "cached up to"
        text += f" token {self.matched:,}"
        if self.boundaries:
            text += f", inside turn {bisect_right(self.boundaries, self.matched) + 1}"
        if self.ended == "evicted":
            text += ", what followed was evicted"
        text += f"; nearest {'snapshot' if self.has_states else 'page'} {self.length:,}"
        return text + (", a later one was evicted" if self.reason == "evicted-snapshot" else "")


@dataclass(slots=True, eq=False)
class Lease:
    """What a living sequence shares of the cache: `nodes`, from the root on.

    While `is_open`, its next pages are cached too. `known` are lengths, of snapshots that others
    made of the same prompt; `pinned` has the snapshot that it reads, `rolling` the last that it
    made while generating.
    """

    root: Node
    nodes: list[Node] = field(default_factory=list)
    is_open: bool = True
    is_exact: bool = True
    has_mtp: bool = True
    known: frozenset[int] = frozenset()
    pinned: Node | None = None
    rolling: Node | None = None

    @property
    def last(self) -> Node:
        """The end of what it shares."""
        return self.nodes[-1] if self.nodes else self.root

    @property
    def length(self) -> int:
        """How many tokens lie in shared pages."""
        return self.last.end

    @property
    def pages(self) -> list[int]:
        """The pages it shares."""
        return [node.page for node in self.nodes]


@dataclass(frozen=True, slots=True)
class Figures:
    """What a cache did so far, and holds: `queries` and `hits` are tokens of prompts, asked for and
    found."""

    queries: int
    hits: int
    reasons: Mapping[Reason, int]
    evicted_pages: int
    evicted_snapshots: int
    pages: int
    snapshots: int


def longest_common(keys: Iterable[bytes], rest: bytes) -> int:
    """How many tokens of `rest` one of the keys begins with, at most."""
    best, most = 0, len(rest) // TOKEN_BYTES
    for key in keys:
        while best < most and key.startswith(rest[: (best + 1) * TOKEN_BYTES]):
            best += 1
    return best


def why_ended(last: Node, rest: bytes, step: int) -> Reason:
    """Why a prompt matches no further than to the page `last`; `rest` is its next page."""
    if hash(rest) in last.evicted:
        return "evicted"
    if last.children:
        return "parts"
    return "hit" if last.end >= step else "short"


def why_unused(pages: Iterable[Node]) -> Reason:
    """Why pages that match cannot be begun with."""
    return "evicted-snapshot" if any(page.has_lost for page in pages) else "no-snapshot"


def exact_snapshots(path: Iterable[Node]) -> Iterator[int]:
    """The lengths at which exact pages that follow exact ones have snapshots."""
    for node in takewhile(lambda node: node.is_exact, path):
        if node.snapshot is not None:
            yield node.end


def verify(hit: Hit, root: Node) -> None:
    """Raise EngineError if what was found has changed since."""
    parent = root
    for node, page in zip(hit.nodes, hit.pages, strict=True):
        if node.parent is not parent or node.page != page:
            raise EngineError(f"a hit of {hit.length} tokens is no longer cached; find it again")
        parent = node
    if hit.nodes and hit.nodes[-1].snapshot != hit.slot:
        raise EngineError(f"a hit of {hit.length} tokens has lost its snapshot; find it again")
