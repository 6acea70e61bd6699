"""The prefix cache: pages of tokens that were computed, shared by the sequences that begin alike.

A tree of full pages. A page is found by the very tokens it holds, under the page before it, so no
two texts are ever taken for one another; every salt has a tree of its own. The recurrent state at
the end of a page may lie in a snapshot: where a model has such states, only there can a sequence
begin. What nobody uses stays until somebody needs its memory: then the least recently used goes,
pages from the ends of the tree, snapshots alone or with their page.

Knows numbers of pages and of slots, and no tensor: who computes fills them, the scheduler asks.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from math import lcm

from nybble.engine.prefix_tree import (
    TOKEN_BYTES,
    Figures,
    Node,
    Reason,
    exact_snapshots,
    longest_common,
    verify,
    why_ended,
    why_unused,
)
from nybble.engine.prefix_tree import Hit as Hit
from nybble.engine.prefix_tree import Lease as Lease
from nybble.errors import EngineError, OutOfPages
from nybble.models.numbers import Numbers

#: States may be taken at multiples of this: there the chunks of the recurrent kernels begin.
STATE_TOKENS = 64

#: Snapshots away from the boundaries of a prompt: so far apart up to there, and so far after.
GRID_TOKENS, GRID_END, LATER_GRID_TOKENS = 512, 4_096, 2_048

#: How many evicted pages after one page are remembered, to say why a lookup missed.
MOST_REMEMBERED = 64


class PrefixCache:
    """Pages and snapshots by the tokens they hold. See the module; `step` is where hits may end.

    A sequence looks up its prompt with `find`, shares what was found from `begin` on, takes the
    pages that it lacks, offers them as they fill with `extend`, and ends with `release`.
    """

    def __init__(
        self,
        pages: Numbers,
        snapshots: Numbers | None,
        page_tokens: int,
        *,
        has_states: bool,
        is_exact: bool = False,
    ) -> None:
        """`has_states`: hits need a snapshot. `is_exact`: only what is bitwise equal to a fresh
        computation is cached. From now on all pages are taken and given back here."""
        self.pages, self.page_tokens = pages, page_tokens
        self.snapshots = snapshots if has_states else None
        self.has_states, self.is_exact = has_states, is_exact
        self.step = lcm(STATE_TOKENS, page_tokens)
        self._roots: dict[bytes, Node] = {}
        # Least recently used first. Of pages, each comes before those before it in a text, so that
        # the first of all ends its text.
        self._idle: OrderedDict[Node, None] = OrderedDict()
        self._unpinned: OrderedDict[Node, None] = OrderedDict()
        self._held = 0
        self._leases: set[Lease] = set()
        self._reserved: set[int] = set()
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[Reason] = Counter()

    # -------------------------------------------------------------------------------- looking up

    def find(
        self,
        prompt: Sequence[int],
        salt: bytes,
        most: int,
        boundaries: Sequence[int] = (),
    ) -> Hit:
        """The longest part of a prompt that a sequence may begin with, `most` tokens at most.

        `boundaries` are the lengths, rising, at which its turns end. Changes nothing. Whether there
        are entries of the MTP head makes no difference: what is drafted must not decide what is
        computed again, and so about bits.
        """
        root = self._roots.get(salt)
        if most < self.step or root is None or not root.children:
            return Hit("short" if most < self.step else "empty", len(prompt))
        tokens = array("i", prompt).tobytes()
        path = self._walk(root, tokens)
        last = path[-1] if path else root
        rest = tokens[last.end * TOKEN_BYTES : (last.end + self.page_tokens) * TOKEN_BYTES]
        matched = last.end + longest_common(last.children, rest)
        reach = min(last.end, most) // self.step * self.step
        nodes = path[: self._depth(path, reach)]
        missing = path[len(nodes) : reach // self.page_tokens]
        ended = "hit" if matched >= most else why_ended(last, rest, self.step)
        return Hit(
            why_unused(missing) if missing else ended,
            len(prompt),
            nodes[-1].end if nodes else 0,
            [node.page for node in nodes],
            nodes[-1].snapshot if nodes else None,
            is_exact=all(node.is_exact for node in nodes),
            has_mtp=all(node.has_mtp for node in nodes),
            matched=matched,
            nodes=tuple(nodes),
            known=frozenset(exact_snapshots(path[len(nodes) :])),
            boundaries=boundaries,
            ended=ended,
            has_states=self.has_states,
        )

    def _walk(self, root: Node, tokens: bytes) -> list[Node]:
        """The cached pages with which the tokens begin."""
        node, path, size = root, [], self.page_tokens * TOKEN_BYTES
        for at in range(0, len(tokens) - size + 1, size):
            child = node.children.get(tokens[at : at + size])
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _depth(self, path: Sequence[Node], reach: int) -> int:
        """How many pages of a path a sequence may begin with, `reach` tokens at most."""
        depth = reach // self.page_tokens
        while self.has_states and depth and path[depth - 1].snapshot is None:
            depth -= 1
        return depth

    # ------------------------------------------------------------------------- sequences that live

    def begin(self, hit: Hit | None, salt: bytes, *, is_counted: bool = True) -> Lease:
        """A sequence begins with what was found, and shares it; None: it did not ask. Figures count
        it if it `is_counted`: one that begins again after preemption finds its own.

        Its snapshot is kept until `unpin`. Raises EngineError for a hit that is no longer there.
        """
        root = self._roots.get(salt) or Node(None, salt, -1, 0, is_exact=True, has_mtp=True)
        lease = Lease(root)
        if hit is not None:
            verify(hit, root)
            if is_counted:
                self._count(hit)
            self._share(lease, hit.nodes)
            lease.known = hit.known
        if hit is not None and hit.slot is not None:
            self._pin(lease)
        self._roots[salt] = root
        root.users += 1
        self._leases.add(lease)
        return lease

    def fork(self, lease: Lease) -> Lease:
        """Another sequence with the same tokens shares what this one does."""
        other = Lease(lease.root, is_open=lease.is_open)
        self._share(other, lease.nodes)
        lease.root.users += 1
        self._leases.add(other)
        return other

    def unpin(self, lease: Lease) -> None:
        """The sequence has read the snapshot that it began with."""
        node, lease.pinned = lease.pinned, None
        if node is not None:
            node.pins -= 1
            if not node.pins:
                self._unpinned[node] = None

    def extend(
        self, lease: Lease, tokens: Sequence[int], page: int, *, is_exact: bool, has_mtp: bool
    ) -> int:
        """A sequence has filled its next page: cache it. Returns the page to use from now on.

        If the same tokens are cached already, with the same bits, that is the cached page, and
        `page` is given back. If they are cached with other bits and somebody uses those, or they
        are exact and these are not, the lease closes: this page and all after it stay the
        sequence's own. `is_exact` and `has_mtp` hold for this page; what follows a page that is not
        is not either.
        """
        if not lease.is_open:
            return page
        is_exact, has_mtp = is_exact and lease.is_exact, has_mtp and lease.has_mtp
        key = self._key(tokens)
        node = lease.last.children.get(key)
        if self.is_exact and not is_exact:
            lease.is_open = False
        elif node is None:
            node = self._add(lease.last, key, page, is_exact, has_mtp)
        elif is_exact and node.is_exact:
            self._share_equal(node, page, has_mtp)
        elif node.users or (node.is_exact and not is_exact):
            lease.is_open = False
        else:
            self._replace(node, page, is_exact, has_mtp)
        if node is None or not lease.is_open:
            return page
        self._share(lease, (node,))
        return node.page

    def release(self, lease: Lease, pages: Sequence[int]) -> None:
        """A sequence ends, or is preempted: of its `pages`, those that it shares stay cached, the
        others are given back. Raises EngineError, and changes nothing, if they do not agree."""
        if lease not in self._leases:
            raise EngineError("the lease of a sequence that ends has ended before")
        shared = len(lease.nodes)
        if list(pages[:shared]) != lease.pages:
            raise EngineError(
                f"a sequence of {len(pages)} pages gives back others than the {shared} that it "
                "shares; the page that `extend` returns must replace its own"
            )
        self.pages.give_back(pages[shared:])
        self.unpin(lease)
        self._leases.remove(lease)
        for node in reversed(lease.nodes):
            node.users -= 1
            if not node.users:
                self._idle[node] = None
        lease.root.users -= 1
        lease.is_open = False
        self._forget(lease.root)

    def _share(self, lease: Lease, nodes: Iterable[Node]) -> None:
        for node in nodes:
            if not node.users:
                self._idle.pop(node, None)
            node.users += 1
            lease.nodes.append(node)
            lease.is_exact &= node.is_exact
            lease.has_mtp &= node.has_mtp

    def _pin(self, lease: Lease) -> None:
        node = lease.pinned = lease.last
        self._unpinned.pop(node, None)
        node.pins += 1

    def _count(self, hit: Hit) -> None:
        self._counts["queries"] += hit.asked
        self._counts["hits"] += hit.length
        self._reasons[hit.reason] += 1

    # ----------------------------------------------------------------------------------- the tree

    def _key(self, tokens: Sequence[int]) -> bytes:
        if len(tokens) != self.page_tokens:
            raise EngineError(
                f"a page to be cached has {len(tokens)} tokens, a full one {self.page_tokens}"
            )
        return array("i", tokens).tobytes()

    def _add(self, parent: Node, key: bytes, page: int, is_exact: bool, has_mtp: bool) -> Node:
        node = Node(parent, key, page, parent.end + self.page_tokens, is_exact, has_mtp)
        parent.children[key] = node
        parent.evicted.discard(hash(key))
        self._held += 1
        return node

    def _share_equal(self, node: Node, page: int, has_mtp: bool) -> None:
        """Of two pages with the same bits one is enough: the one with entries of the MTP head, if
        nobody uses the other."""
        if has_mtp and not node.has_mtp and not node.users:
            node.page, page, node.has_mtp = page, node.page, True
        self.pages.give_back([page])

    def _replace(self, node: Node, page: int, is_exact: bool, has_mtp: bool) -> None:
        """A page that nobody uses gets other bits; the state at its end goes with the old ones, and
        so do the pages after it, which were computed from them."""
        self._forget_after(node)
        self.pages.give_back([node.page])
        if node.snapshot is not None:
            self._give_back_slot(self._detach(node))
        node.page, node.is_exact, node.has_mtp = page, is_exact, has_mtp

    def _forget_after(self, node: Node) -> None:
        """All pages after one that nobody uses: nobody uses them either."""
        after = list(node.children.values())
        for each in after:  # grows while it is walked; a text may be thousands of pages long
            after += each.children.values()
        for each in reversed(after):
            del self._idle[each]
            self._remove(each)

    def _remove(self, node: Node) -> Node:
        """Forget a page without users, the last of its text, and its snapshot; the page before."""
        parent = node.parent
        if parent is None or node.children:
            raise EngineError(f"page {node.page} is to be evicted before the pages after it")
        if node.snapshot is not None:
            self._give_back_slot(self._detach(node))
        self.pages.give_back([node.page])
        del parent.children[node.key]
        node.parent = None
        self._held -= 1
        return parent

    def _forget(self, root: Node) -> None:
        """Drop a root of nothing: salts may be many."""
        if not root.users and not root.children:
            self._roots.pop(root.key, None)

    # ------------------------------------------------------------------------------------- memory

    @property
    def available(self) -> int:
        """How many pages `take` can give."""
        return self.pages.free + len(self._idle)

    def room(self, hit: Hit | None) -> int:
        """How many pages `take` can give once a sequence has begun with a hit."""
        nodes = hit.nodes if hit is not None else ()
        return self.available - sum(not node.users for node in nodes)

    def take(self, count: int = 1) -> list[int]:
        """Pages for the caller alone; for their sake the least recently used are evicted that
        nobody uses. All of them or none: raises OutOfPages, and evicts none."""
        if count > self.available:
            raise OutOfPages(
                f"{count} of {self.pages.what} were asked for, {self.pages.free} of "
                f"{self.pages.count} are free and {len(self._idle)} more are cached and unused; "
                "shorten the prompts or give the engine more memory"
            )
        for _ in range(count - self.pages.free):
            self._evict_page()
        return self.pages.take(count)

    def _evict_page(self) -> None:
        node, _ = self._idle.popitem(last=False)
        self._counts["evicted snapshots"] += node.snapshot is not None
        self._counts["evicted pages"] += 1
        parent = self._remove(node)
        if len(parent.evicted) >= MOST_REMEMBERED:
            parent.evicted.clear()
        parent.evicted.add(hash(node.key))
        if parent.parent is None:
            self._forget(parent)

    def clear(self) -> None:
        """Forget all pages without users, and their snapshots. No eviction: nobody needed them."""
        while self._idle:
            node, _ = self._idle.popitem(last=False)
            self._remove(node)
        for root in list(self._roots.values()):
            self._forget(root)

    # ---------------------------------------------------------------------------------- snapshots

    def positions(
        self, lease: Lease, start: int, end: int, boundaries: Sequence[int] = ()
    ) -> list[int]:
        """Where to take snapshots of a prompt that is computed from `start` to `end`, its length.

        They are multiples of `step`, after `start`: at or before each boundary and the end, and on
        the grid; those that are worth most first: the end of the first turn, that all
        conversations of a kind share; the end; the turns before it; then the grid, coarse before
        fine. Half of all snapshots at most. None where others have taken one.
        """
        if self.snapshots is None or not self.has_states or not lease.is_open:
            return []
        inner = [at for at in boundaries if at < end]
        wanted = [*inner[:1], end, *reversed(inner[1:]), *_grid(end)]
        places = dict.fromkeys(at // self.step * self.step for at in wanted)
        found = [at for at in places if at > start and at not in lease.known]
        return found[: max(1, self.snapshots.count // 2)] if self.snapshots.count else []

    def has_snapshot(self, lease: Lease, tokens: Sequence[int]) -> bool:
        """Whether a state lies at the end of these tokens, with which a sequence begins that holds
        the lease: then another would be given back."""
        path = self._walk(lease.last, array("i", tokens[lease.length :]).tobytes())
        end = path[-1] if path else lease.last
        return end.end == len(tokens) and end.snapshot is not None

    @property
    def reserved(self) -> int:
        """How many slots are neither free nor snapshots; none between steps."""
        return len(self._reserved)

    def reserve(self, count: int = 1) -> list[int]:
        """Slots to write states to, as many of `count` as can be had: free ones, then those of the
        least recently used snapshots that nobody reads. Each is then attached or cancelled."""
        if self.snapshots is None:
            return []
        while self.snapshots.free < count and self._unpinned:
            node = next(iter(self._unpinned))
            node.has_lost = True
            self._give_back_slot(self._detach(node))
            self._counts["evicted snapshots"] += 1
        slots = self.snapshots.take(min(count, self.snapshots.free))
        self._reserved.update(slots)
        return slots

    def renew(self, lease: Lease) -> int | None:
        """A slot for the state that a sequence has reached while it generates: that of its last
        such snapshot, which the new one makes useless, else a reserved one; None if there is none,
        or the lease is closed."""
        node, lease.rolling = lease.rolling, None
        if not lease.is_open:
            return None
        if node is None or node.snapshot is None or node.pins:
            return next(iter(self.reserve()), None)
        slot = self._detach(node)
        self._reserved.add(slot)
        return slot

    def attach(self, lease: Lease, length: int, slot: int, *, is_rolling: bool = False) -> bool:
        """A reserved slot holds the state after `length` tokens of a sequence: a snapshot, if the
        cache has the page that ends there, and none of it yet; else the slot is given back.
        `is_rolling`: the next `renew` may have it. Returns whether it is one now."""
        if length % self.step or length < self.step:
            self.cancel([slot])
            raise EngineError(
                f"a snapshot after {length} tokens; expected a multiple of {self.step}"
            )
        depth = length // self.page_tokens
        node = lease.nodes[depth - 1] if depth <= len(lease.nodes) else None
        if node is None or node.snapshot is not None:
            self.cancel([slot])
            if node is not None and not node.pins:
                self._unpinned.move_to_end(node)
            return False
        self._unreserve([slot])
        node.snapshot, node.has_lost = slot, False
        self._unpinned[node] = None
        if is_rolling:
            lease.rolling = node
        return True

    def cancel(self, slots: Sequence[int]) -> None:
        """Give back reserved slots that hold nothing of use."""
        self._unreserve(slots)
        for slot in slots:
            self._give_back_slot(slot)

    def _unreserve(self, slots: Sequence[int]) -> None:
        if not self._reserved.issuperset(slots):
            raise EngineError(
                f"snapshots {list(slots)} are not all reserved: {sorted(self._reserved)} are"
            )
        self._reserved.difference_update(slots)

    def _detach(self, node: Node) -> int:
        slot, node.snapshot = node.snapshot, None
        if slot is None or node.pins:
            raise EngineError(f"snapshot {slot} at token {node.end} is read by {node.pins}")
        del self._unpinned[node]
        return slot

    def _give_back_slot(self, slot: int) -> None:
        if self.snapshots is not None:
            self.snapshots.give_back([slot])

    # ------------------------------------------------------------------------------------- figures

    @property
    def figures(self) -> Figures:
        """What was done so far, and what is held now."""
        slots = len(self.snapshots.lent) if self.snapshots is not None else 0
        return Figures(
            self._counts["queries"],
            self._counts["hits"],
            dict(self._reasons),
            self._counts["evicted pages"],
            self._counts["evicted snapshots"],
            self._held,
            slots - len(self._reserved),
        )

    def check(self, lent: Sequence[int] = ()) -> None:
        """Raise EngineError unless all is conserved: each page that is lent is cached once or is
        one of `lent`, those that sequences hold alone; users are leases, and so on."""
        nodes = list(self._nodes())
        self._check_pages([node.page for node in nodes], lent)
        self._check_users(nodes)
        self._check_order(nodes)
        self._check_snapshots(nodes)

    def _nodes(self) -> Iterator[Node]:
        """All that is cached, pages before those after them."""
        rest = list(self._roots.values())
        while rest:
            node = rest.pop()
            rest += node.children.values()
            if node.end:
                yield node

    def _check_pages(self, cached: Sequence[int], lent: Sequence[int]) -> None:
        self.pages.check()
        owned = Counter([*cached, *lent])
        if len(owned) < len(cached) + len(lent) or owned.keys() != self.pages.lent:
            twice = [page for page, owners in owned.items() if owners > 1]
            differ = sorted(owned.keys() ^ self.pages.lent)
            raise EngineError(
                f"pages {twice} have two owners; {differ} are lent or owned, not both"
            )
        if len(cached) != self._held:
            raise EngineError(f"{len(cached)} pages are cached, {self._held} were counted")

    def _check_users(self, nodes: Sequence[Node]) -> None:
        users = Counter(node for lease in self._leases for node in (lease.root, *lease.nodes))
        pins = Counter(lease.pinned for lease in self._leases if lease.pinned is not None)
        for node in (*self._roots.values(), *nodes):
            if (node.users, node.pins) != (users.pop(node, 0), pins.pop(node, 0)):
                raise EngineError(
                    f"page {node.page}: {node.users} users and {node.pins} readers are not those "
                    "of the leases"
                )
        if users or pins:
            raise EngineError("a lease shares pages that are not cached")

    def _check_order(self, nodes: Sequence[Node]) -> None:
        ages = {node: age for age, node in enumerate(self._idle)}
        if ages.keys() != {node for node in nodes if not node.users}:
            raise EngineError("the pages that may be evicted are not those without users")
        for node in nodes:
            parent = node.parent
            if parent is None or parent.children.get(node.key) is not node:
                raise EngineError(f"page {node.page} does not hang where it was found")
            if node.end != parent.end + self.page_tokens:
                raise EngineError(f"page {node.page} ends at {node.end}, after {parent.end}")
            if parent in ages and ages[parent] < ages.get(node, len(ages)):
                raise EngineError(f"page {parent.page} would be evicted before {node.page}")

    def _check_snapshots(self, nodes: Sequence[Node]) -> None:
        held = [node for node in nodes if node.snapshot is not None]
        if self._unpinned.keys() != {node for node in held if not node.pins}:
            raise EngineError("the snapshots that may be evicted are not those that nobody reads")
        if self.snapshots is None:
            return
        self.snapshots.check()
        owned = Counter([*(n.snapshot for n in held if n.snapshot is not None), *self._reserved])
        if len(owned) < len(held) + len(self._reserved) or owned.keys() != self.snapshots.lent:
            differ = sorted(owned.keys() ^ self.snapshots.lent)
            raise EngineError(
                f"{len(held)} snapshots are attached and {len(self._reserved)} reserved; "
                f"{differ} are lent or owned, not both, or one has two owners"
            )


def _grid(end: int) -> list[int]:
    """Lengths up to `end` on the grid of snapshots, coarse before fine."""
    fine = range(GRID_TOKENS, min(end, GRID_END) + 1, GRID_TOKENS)
    coarse = range(GRID_END + LATER_GRID_TOKENS, end + 1, LATER_GRID_TOKENS)
    return sorted([*fine, *coarse], key=lambda at: (-(at & -at), at))
