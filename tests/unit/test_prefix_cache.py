"""What the prefix cache finds, shares and forgets, and says of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from nybble.engine.prefix import GRID_END, MOST_REMEMBERED, Hit, Lease, PrefixCache
from nybble.errors import EngineError, OutOfPages
from nybble.models.numbers import Numbers

SALT = b"a key"


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(150_000) for _ in range(length))


def parted(prompt: Sequence[int], at: int, seed: int = 1) -> tuple[int, ...]:
    """A prompt of the same length that goes on otherwise from `at`."""
    return (*prompt[:at], *(token ^ seed for token in prompt[at:]))


def cache_of(
    pages: int = 200, snapshots: int = 64, page_tokens: int = 64, **kinds: bool
) -> PrefixCache:
    kinds.setdefault("has_states", True)
    slots = Numbers(snapshots, "snapshots", first=5)
    return PrefixCache(Numbers(pages, "pages"), slots, page_tokens, **kinds)


@dataclass
class Running:
    """A sequence as a scheduler would move it."""

    cache: PrefixCache
    tokens: tuple[int, ...]
    hit: Hit
    lease: Lease
    pages: list[int] = field(default_factory=list)

    def fill(self, upto: int | None = None, **bits: bool) -> None:
        """Its pages are computed, up to so many tokens."""
        bits = {"is_exact": True, "has_mtp": True, **bits}
        size = self.cache.page_tokens
        end = len(self.tokens) if upto is None else upto
        for at in range(len(self.lease.nodes), end // size):
            tokens = self.tokens[at * size : (at + 1) * size]
            self.pages[at] = self.cache.extend(self.lease, tokens, self.pages[at], **bits)

    def end(self) -> None:
        self.cache.release(self.lease, self.pages)


def start(
    cache: PrefixCache,
    prompt: Sequence[int],
    boundaries: Sequence[int] = (),
    salt: bytes = SALT,
    most: int | None = None,
) -> Running:
    hit = cache.find(prompt, salt, len(prompt) - 1 if most is None else most, boundaries)
    lease = cache.begin(hit, salt)
    cache.unpin(lease)
    own = cache.take(-(-len(prompt) // cache.page_tokens) - len(hit.pages))
    return Running(cache, tuple(prompt), hit, lease, hit.pages + own)


def attach(cache: PrefixCache, lease: Lease, *lengths: int) -> list[bool]:
    slots = cache.reserve(len(lengths))
    return [cache.attach(lease, n, slot) for n, slot in zip(lengths, slots, strict=True)]


def serve(
    cache: PrefixCache,
    prompt: Sequence[int],
    boundaries: Sequence[int] = (),
    salt: bytes = SALT,
    **bits: bool,
) -> Hit:
    """Compute a prompt, with the snapshots that the cache wants, and end."""
    running = start(cache, prompt, boundaries, salt)
    length = running.hit.length
    places = cache.positions(running.lease, length, len(prompt), boundaries)
    slots = cache.reserve(len(places))
    running.fill(**bits)
    for place, slot in sorted(zip(places, slots, strict=False)):
        cache.attach(running.lease, place, slot)
    running.end()
    cache.check()
    return running.hit


# ------------------------------------------------------------------------------------- looking up


@pytest.mark.parametrize(
    ("boundaries", "shared", "reason"),
    [((1_800,), 1_792, "parts"), ((1_855,), 1_792, "parts"), ((), 1_536, "no-snapshot")],
)
def test_prompts_that_part_share_what_lies_before(
    boundaries: tuple[int, ...], shared: int, reason: str
) -> None:
    """At the nearest snapshot: at a boundary's last multiple of 64, else on the grid."""
    cache, prompt = cache_of(), text(3_000)
    serve(cache, prompt, boundaries)
    hit = serve(cache, parted(prompt, 1_842), boundaries)
    assert (hit.length, hit.matched, hit.reason) == (shared, 1_842, reason)
    assert len(hit.pages) == shared // 64


def test_the_explanation_of_the_issue() -> None:
    cache, prompt = cache_of(), text(3_000)
    serve(cache, prompt, (900, 1_800, 2_500))
    hit = cache.find(parted(prompt, 1_842), SALT, 2_999, (900, 1_800, 2_500))
    assert hit.explain() == "parts at token 1,842, inside turn 3; nearest snapshot 1,792"
    hit = cache.find(parted(prompt, 1_799), SALT, 2_999, (900, 1_800, 2_500))
    assert hit.explain() == "parts at token 1,799, inside turn 2; nearest snapshot 1,792"
    hit = cache.find(parted(prompt, 1_800), SALT, 2_999, (900, 1_800, 2_500))
    assert hit.explain() == "parts at token 1,800, inside turn 3; nearest snapshot 1,792"


def test_every_reason_is_told() -> None:
    cache, prompt = cache_of(pages=40), text(1_100)
    told = [cache.find(prompt, SALT, 1_099)]
    serve(cache, prompt)
    told.append(cache.find(prompt[:64], SALT, 63))
    told.append(cache.find((*prompt, *text(200, 3)), SALT, 1_299))
    told.append(cache.find(parted(prompt, 700), SALT, 1_099))
    told.append(cache.find(parted(prompt, 5), SALT, 1_099))
    assert [(hit.reason, hit.length, hit.explain()) for hit in told] == [
        ("empty", 0, "nothing is cached under this key and salt"),
        ("short", 0, "64 tokens end before the first place where a hit may end"),
        ("hit", 1_088, "cached up to token 1,088; nearest snapshot 1,088"),
        ("no-snapshot", 512, "parts at token 700; nearest snapshot 512"),
        ("parts", 0, "parts at token 5; nearest snapshot 0"),
    ]
    cache.cancel(cache.reserve(63))  # of three snapshots the first two go
    hit = cache.find(parted(prompt, 700), SALT, 1_099)
    assert (hit.reason, hit.length) == ("evicted-snapshot", 0)
    assert hit.explain() == "parts at token 700; nearest snapshot 0, a later one was evicted"
    cache.pages.give_back(cache.take(24))  # one page of 17 goes, the last
    hit = cache.find(prompt, SALT, 1_099)
    assert (hit.matched, hit.ended) == (1_024, "evicted")
    assert "cached up to token 1,024, what followed was evicted" in hit.explain()


def test_without_states_pages_alone_are_found() -> None:
    cache, prompt = cache_of(has_states=False, snapshots=0), text(3_000)
    serve(cache, prompt)
    hit = cache.find(parted(prompt, 1_842), SALT, 2_999)
    assert (hit.length, hit.slot, hit.reason) == (1_792, None, "parts")
    assert hit.explain() == "parts at token 1,842; nearest page 1,792"
    hit = cache.find(prompt, SALT, 2_999)
    assert (hit.length, hit.matched, hit.reason) == (2_944, 3_000 // 64 * 64, "hit")
    assert cache.find(prompt, SALT, 0).reason == "short"


def test_what_is_cached_may_be_too_short() -> None:
    cache, prompt = cache_of(page_tokens=16), text(100)
    serve(cache, prompt[:40])
    hit = cache.find(prompt, SALT, 99)
    assert (hit.reason, hit.matched, hit.length) == ("short", 32, 0)
    assert hit.explain() == "cached up to token 32; nearest snapshot 0"


@pytest.mark.parametrize(("page_tokens", "step"), [(16, 64), (64, 64), (96, 192), (128, 128)])
def test_hits_end_where_pages_and_chunks_do(page_tokens: int, step: int) -> None:
    for has_states in (True, False):
        cache = cache_of(page_tokens=page_tokens, has_states=has_states)
        assert cache.step == step
        prompt = text(1_500)
        serve(cache, prompt)
        hit = cache.find(prompt, SALT, 1_499)
        assert hit.length == 1_499 // step * step
        assert len(hit.pages) * page_tokens == hit.length


def test_no_more_comes_from_the_cache_than_may() -> None:
    cache, prompt = cache_of(), text(1_024)
    serve(cache, prompt)
    assert cache.find(prompt, SALT, 1_024).length == 1_024
    hit = cache.find(prompt, SALT, 1_023)
    assert (hit.length, hit.matched, hit.reason) == (512, 1_024, "no-snapshot")
    assert hit.known == {1_024}  # where no second snapshot is wanted
    assert cache.positions(cache.begin(hit, SALT), 512, 1_024) == []


def test_keys_do_not_see_each_other() -> None:
    cache, prompt = cache_of(), text(640)
    serve(cache, prompt, salt=b"one")
    assert cache.find(prompt, b"two", 639).reason == "empty"
    assert cache.find(prompt, b"one", 639).length == 512
    serve(cache, prompt, salt=b"two")
    assert cache.figures.pages == 20


def test_a_key_of_nothing_is_forgotten() -> None:
    """Else a server with a key per caller would grow for ever."""
    cache = cache_of(pages=10)
    for number in range(50):
        serve(cache, text(640, number), salt=str(number).encode())
    running = start(cache, text(10), salt=b"none")
    running.end()
    cache.take(10)
    assert not cache._roots
    cache.check(list(range(10)))


def test_the_first_tokens_of_a_page_are_compared_with_all_pages() -> None:
    cache, prompt = cache_of(), text(64)
    for at in (3, 40, 17):
        serve(cache, parted(prompt, at, seed=at))
    assert cache.find((*prompt, 1), SALT, 64).matched == 40
    assert cache.find((*prompt[:20], 7), SALT, 20).reason == "short"


def test_a_hit_is_exact_and_has_mtp_if_all_its_pages_do() -> None:
    cache, prompt = cache_of(), text(1_024)
    running = start(cache, prompt)
    running.fill(512)
    running.fill(1_024, is_exact=False)
    attach(cache, running.lease, 512, 1_024)
    found = [cache.find(prompt, SALT, most) for most in (1_023, 1_024)]
    assert [(hit.length, hit.is_exact, hit.has_mtp) for hit in found] == [
        (512, True, True),
        (1_024, False, True),
    ]
    assert found[0].known == set()  # whoever computes the rest will have other bits
    other = parted(prompt, 64)
    running = start(cache, other)
    running.fill(512, has_mtp=False)
    attach(cache, running.lease, 512)
    assert not cache.find(other, SALT, 1_023).has_mtp


def test_what_follows_a_page_that_is_not_exact_is_not() -> None:
    cache, prompt = cache_of(), text(192)
    running = start(cache, prompt)
    running.fill(64, is_exact=False, has_mtp=False)
    running.fill(192)
    assert [(n.is_exact, n.has_mtp) for n in running.lease.nodes] == [(False, False)] * 3


# ---------------------------------------------------------------------------------------- sharing


def test_two_that_compute_the_same_share_pages() -> None:
    cache, prompt = cache_of(), text(300)
    one, two = start(cache, prompt), start(cache, prompt)
    assert two.hit.length == 0
    one.fill()
    free = cache.pages.free
    two.fill()
    assert cache.pages.free == free + 4
    assert two.pages[:4] == one.pages[:4]
    assert two.pages[4] != one.pages[4]
    cache.check([one.pages[4], two.pages[4]])
    one.end()
    two.end()
    assert cache.figures.pages == 4
    cache.check()


@pytest.mark.parametrize(
    ("cached", "ours", "shares"),
    [
        ((True, True), (True, True), True),
        ((True, True), (True, False), True),
        ((True, False), (True, True), True),
        ((False, True), (True, True), False),
        ((True, True), (False, True), False),
        ((False, False), (False, False), False),
    ],
)
def test_pages_of_other_bits_are_not_shared(
    cached: tuple[bool, bool], ours: tuple[bool, bool], shares: bool
) -> None:
    cache, prompt = cache_of(), text(300)
    one, two = start(cache, prompt), start(cache, prompt)
    one.fill(is_exact=cached[0], has_mtp=cached[1])
    two.fill(is_exact=ours[0], has_mtp=ours[1])
    assert two.lease.is_open == shares == (two.pages[:4] == one.pages[:4])
    if not shares:
        assert attach(cache, two.lease, 64) == [False]
        assert cache.positions(two.lease, 0, 300, ()) == []
        assert cache.renew(two.lease) is None
    one.end()
    two.end()
    cache.check()


@pytest.mark.parametrize(
    ("cached", "ours", "is_replaced"),
    [
        ((False, True), (True, True), True),
        ((False, True), (False, True), True),
        ((True, True), (False, True), False),
    ],
)
def test_pages_that_nobody_uses_make_way(
    cached: tuple[bool, bool], ours: tuple[bool, bool], is_replaced: bool
) -> None:
    """Else a conversation whose old snapshots are gone would never be cached again."""
    cache, prompt = cache_of(), text(300)
    one = start(cache, prompt)
    one.fill(is_exact=cached[0], has_mtp=cached[1])
    attach(cache, one.lease, 256)
    one.end()
    two = start(cache, prompt, most=0)
    mine = list(two.pages)
    two.fill(is_exact=ours[0], has_mtp=ours[1])
    assert two.pages == mine
    assert two.lease.is_open == is_replaced
    hit = cache.find(prompt, SALT, 299)
    if is_replaced:
        assert hit.length == 0  # its state went with its bits
        assert [(n.is_exact, n.has_mtp) for n in two.lease.nodes] == [ours] * 4
        assert attach(cache, two.lease, 256) == [True]
    else:
        assert hit.length == 256
    two.end()
    cache.check()


def test_an_equal_page_with_entries_takes_the_place_of_one_without() -> None:
    """The bits are the same, so what lies behind and the state stay; whether there are entries
    decides about guesses, never about what is computed again."""
    cache, prompt = cache_of(), text(300)
    one = start(cache, prompt)
    one.fill(has_mtp=False)
    attach(cache, one.lease, 256)
    one.end()
    two = start(cache, prompt, most=0)
    mine = list(two.pages)
    two.fill(has_mtp=True)
    assert two.pages == mine
    hit = cache.find(prompt, SALT, 299)
    assert (hit.length, hit.has_mtp, hit.is_exact) == (256, True, True)
    two.end()
    cache.check()


def test_an_exact_cache_keeps_what_is_exact() -> None:
    cache, prompt = cache_of(is_exact=True), text(300)
    running = start(cache, prompt)
    running.fill(128)
    running.fill(300, is_exact=False)
    assert len(running.lease.nodes) == 2
    assert not running.lease.is_open
    assert cache.find(prompt, SALT, 299).matched == 128


def test_choices_share_what_their_leader_has() -> None:
    cache, prompt = cache_of(), text(300)
    leader = start(cache, prompt)
    leader.fill()
    follower = cache.fork(leader.lease)
    assert follower.pages == leader.pages[:4]
    leader.end()
    cache.check()
    assert cache.available == 196
    cache.release(follower, follower.pages)
    assert cache.available == 200
    cache.check()


def test_a_sequence_that_did_not_ask_is_cached_but_not_counted() -> None:
    cache = cache_of()
    lease = cache.begin(None, SALT)
    [page] = cache.take()
    assert cache.extend(lease, text(64), page, is_exact=True, has_mtp=True) == page
    cache.release(lease, [page])
    assert cache.figures.queries == 0
    assert cache.find(text(65), SALT, 64).matched == 64


# ----------------------------------------------------------------------------------------- memory


def test_pages_go_from_the_end_of_the_oldest_text() -> None:
    cache = cache_of(pages=12, snapshots=0)
    first, second = text(256, 1), text(256, 2)
    serve(cache, first)
    serve(cache, second)
    cache.begin(cache.find(first, SALT, 0), SALT)
    own = cache.take(4)
    assert cache.available == 8
    own += cache.take(2)
    assert cache.find((*first, 1), SALT, 256).matched == 128
    assert cache.find((*second, 1), SALT, 256).matched == 256
    own += cache.take(6)
    assert cache.find(first, SALT, 255).reason == "empty"
    figures = cache.figures
    assert (figures.evicted_pages, figures.pages) == (8, 0)
    cache.check(own)
    with pytest.raises(OutOfPages, match="1 of pages were asked for, 0 of 12 are free and 0 more"):
        cache.take()


def test_what_is_asked_in_vain_evicts_nothing() -> None:
    cache = cache_of(pages=6)
    serve(cache, text(256))
    with pytest.raises(OutOfPages, match="7 of pages .* 2 of 6 are free and 4 more are cached"):
        cache.take(7)
    assert cache.figures.evicted_pages == 0
    assert cache.take(0) == []


def test_a_hit_that_begins_leaves_less_room() -> None:
    cache, prompt = cache_of(pages=20), text(640)
    serve(cache, prompt)
    hit = cache.find(prompt, SALT, 639)
    assert (cache.room(None), cache.room(hit)) == (20, 12)
    cache.begin(hit, SALT)
    assert cache.available == cache.room(hit) == 12


def test_the_snapshot_that_was_used_last_stays() -> None:
    cache = cache_of(snapshots=3)
    prompts = [text(64 + 1, seed) for seed in range(3)]
    for prompt in prompts:
        running = start(cache, prompt)
        running.fill()
        attach(cache, running.lease, 64)
        running.end()
    cache.release(cache.begin(hit := cache.find(prompts[0], SALT, 64), SALT), hit.pages)
    cache.cancel(cache.reserve(2))
    assert [cache.find(p, SALT, 64).length for p in prompts] == [64, 0, 0]
    assert cache.figures.evicted_snapshots == 2
    assert cache.figures.pages == 3


def test_a_snapshot_that_is_made_again_counts_as_used() -> None:
    cache = cache_of(snapshots=3)
    prompts = [text(64, seed) for seed in range(2)]
    for prompt in (*prompts, prompts[0]):
        running = start(cache, prompt)
        running.fill()
        attach(cache, running.lease, 64)
        running.end()
    cache.cancel(cache.reserve(2))
    assert [cache.find(p, SALT, 64).length for p in prompts] == [64, 0]


def test_a_snapshot_that_is_read_stays() -> None:
    cache, prompt = cache_of(snapshots=1), text(65)
    serve(cache, prompt)
    hit = cache.find(prompt, SALT, 64)
    lease, other = cache.begin(hit, SALT), cache.begin(hit, SALT)
    assert cache.reserve(3) == []
    cache.unpin(lease)
    cache.unpin(lease)  # a second time changes nothing
    assert cache.reserve() == []
    cache.release(other, hit.pages)
    assert cache.reserve(3) == [5]
    cache.check()


def test_a_state_of_generated_text_takes_the_place_of_the_one_before() -> None:
    """A long answer must not drive out all other snapshots."""
    cache, answer = cache_of(snapshots=4), text(640)
    running = start(cache, answer, most=0)
    for length in range(64, 641, 64):
        running.fill(length, is_exact=False)
        slot = cache.renew(running.lease)
        assert slot is not None
        assert cache.attach(running.lease, length, slot, is_rolling=True)
        assert cache.figures.snapshots == 1
        cache.check(running.pages[length // 64 :])
    hit = cache.find((*answer, 1), SALT, 640)
    assert hit.length == 640
    cache.begin(hit, SALT)
    other = cache.renew(running.lease)  # somebody reads it: then another
    assert other is not None
    assert other != hit.slot
    assert cache.find((*answer, 1), SALT, 640).slot == hit.slot


def test_the_pages_of_a_text_take_its_snapshot_along() -> None:
    cache = cache_of(pages=4, snapshots=2)
    serve(cache, text(128))
    assert cache.figures.snapshots == 1
    cache.take(3)
    figures = cache.figures
    assert (figures.pages, figures.snapshots, figures.evicted_snapshots) == (1, 0, 1)


def test_clearing_leaves_what_is_used() -> None:
    cache = cache_of()
    serve(cache, text(640, 1))
    running = start(cache, text(640, 2))
    running.fill()
    cache.clear()
    figures = cache.figures
    assert (figures.pages, figures.snapshots, figures.evicted_pages) == (10, 0, 0)
    assert cache.find(text(640, 1), SALT, 639).length == 0
    running.end()
    cache.clear()
    assert cache.find(text(640, 2), SALT, 639).reason == "empty"
    assert cache.pages.free == 200
    cache.check()


def test_what_is_remembered_of_the_evicted_is_bounded() -> None:
    cache = cache_of(pages=2, snapshots=0)
    holder = start(cache, text(64, 0))
    holder.fill()  # so that the root stays
    for seed in range(1, MOST_REMEMBERED + 3):
        serve(cache, text(64, seed))
    assert len(holder.lease.root.evicted) <= MOST_REMEMBERED
    assert cache.find((*text(64, MOST_REMEMBERED + 1), 0), SALT, 64).reason == "evicted"
    serve(cache, text(64, MOST_REMEMBERED + 1))
    cache.clear()  # what was cached again is evicted no more
    assert cache.find((*text(64, MOST_REMEMBERED + 1), 0), SALT, 64).reason == "parts"


# -------------------------------------------------------------------------------------- snapshots


def places(
    end: int, boundaries: Sequence[int] = (), start: int = 0, snapshots: int = 999, **kinds: Any
) -> list[int]:
    cache = cache_of(snapshots=snapshots, **kinds)
    return cache.positions(cache.begin(None, SALT), start, end, boundaries)


def test_snapshots_lie_at_boundaries_and_on_a_grid() -> None:
    assert places(700) == [640, 512]
    assert places(700, (70, 300, 699)) == [64, 640, 256, 512]
    assert sorted(places(9_000)) == [*range(512, GRID_END + 1, 512), 6_144, 8_192, 8_960]
    assert places(63) == []
    assert places(64) == [64]


def test_the_most_useful_snapshots_come_first() -> None:
    """The first turn, the end, the turns before it; then every 4,096, 2,048, 1,024, 512."""
    found = places(9_000, (130, 1_000, 5_000, 8_500))
    assert found[:5] == [128, 8_960, 8_448, 4_992, 960]
    assert found[5:] == [8_192, 4_096, 2_048, 6_144, 1_024, 3_072, 512, 1_536, 2_560, 3_584]
    assert places(9_000, (130, 1_000, 5_000, 8_500), snapshots=7) == found[:3]
    assert places(9_000, (130, 1_000), snapshots=1) == [128]


def test_snapshots_are_taken_of_what_is_computed() -> None:
    assert places(700, (70, 300), start=256) == [640, 512]
    assert places(700, (70, 300), start=640) == []
    assert places(700, snapshots=0) == []
    assert places(700, has_states=False) == []
    assert places(2_000, (1_000,), page_tokens=96) == [960, 1_920, 384, 1_536]


def test_a_snapshot_is_attached_once_and_where_the_pages_reach() -> None:
    cache, prompt = cache_of(snapshots=4), text(300)
    running = start(cache, prompt)
    running.fill(192)
    assert attach(cache, running.lease, 128, 128, 256) == [True, False, False]
    assert len(cache.snapshots.lent if cache.snapshots else ()) == 1
    with pytest.raises(EngineError, match="after 100 tokens; expected a multiple of 64"):
        cache.attach(running.lease, 100, cache.reserve()[0])
    with pytest.raises(EngineError, match=r"snapshots \[3\] are not all reserved: \[\] are"):
        cache.attach(running.lease, 64, 3)
    with pytest.raises(EngineError, match="not all reserved"):
        cache.cancel([6])
    cache.check(running.pages[3:])


def test_without_states_nothing_is_reserved() -> None:
    cache = cache_of(has_states=False)
    assert cache.reserve(2) == []
    assert cache.figures.snapshots == 0


# ----------------------------------------------------------------------------------------- misuse


def test_a_hit_that_is_no_longer_there_is_refused() -> None:
    cache, prompt = cache_of(pages=12), text(640)
    serve(cache, prompt)
    hit = cache.find(prompt, SALT, 639)
    cache.cancel(cache.reserve(64))
    with pytest.raises(EngineError, match="a hit of 512 tokens has lost its snapshot"):
        cache.begin(hit, SALT)
    cache.take(5)
    with pytest.raises(EngineError, match="a hit of 512 tokens is no longer cached; find it"):
        cache.begin(hit, SALT)
    with pytest.raises(EngineError, match="no longer cached"):
        cache.begin(hit, b"another key")
    assert cache.figures.queries == 640  # those of the first


def test_a_sequence_gives_back_what_it_has() -> None:
    cache, prompt = cache_of(), text(300)
    running = start(cache, prompt)
    running.fill()
    with pytest.raises(EngineError, match="a sequence of 5 pages gives back others than the 4"):
        cache.release(running.lease, running.pages[::-1])
    with pytest.raises(EngineError, match="a page to be cached has 3 tokens, a full one 64"):
        cache.extend(running.lease, (1, 2, 3), 0, is_exact=True, has_mtp=True)
    running.end()
    with pytest.raises(EngineError, match="has ended before"):
        running.end()
    cache.check()


def break_page(cache: PrefixCache, running: Running) -> None:
    running.lease.nodes[0].page = running.pages[4]


def break_users(cache: PrefixCache, running: Running) -> None:
    running.lease.nodes[1].users += 1


def break_lease(cache: PrefixCache, running: Running) -> None:
    running.lease.nodes.append(running.lease.nodes[0])


def break_tree(cache: PrefixCache, running: Running) -> None:
    running.lease.nodes[2].end += 64


def break_key(cache: PrefixCache, running: Running) -> None:
    running.lease.nodes[2].key = b""


def break_slot(cache: PrefixCache, running: Running) -> None:
    running.lease.nodes[3].snapshot = None


def break_reserved(cache: PrefixCache, running: Running) -> None:
    cache._reserved.add(7)


def break_order(cache: PrefixCache, running: Running) -> None:
    for node in running.lease.nodes:
        node.users = 0
        cache._idle[node] = None
    cache._leases.clear()
    running.lease.root.users = 0


def break_idle(cache: PrefixCache, running: Running) -> None:
    cache._idle[running.lease.nodes[0]] = None


def break_count(cache: PrefixCache, running: Running) -> None:
    cache._held += 1


def break_lent(cache: PrefixCache, running: Running) -> None:
    cache.pages.take()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_page, "have two owners"),
        (break_lent, "are lent or owned, not both"),
        (break_count, "4 pages are cached, 5 were counted"),
        (break_users, "2 users and 0 readers are not those of the leases"),
        (break_lease, "1 users and 0 readers are not"),
        (break_tree, "ends at 256, after 128"),
        (break_key, "does not hang where it was found"),
        (break_slot, "snapshots that may be evicted"),
        (break_reserved, r"1 snapshots are attached and 1 reserved; \[7\]"),
        (break_order, "would be evicted before"),
        (break_idle, "pages that may be evicted"),
    ],
)
def test_a_loss_is_noticed(spoil: Any, message: str) -> None:
    cache = cache_of()
    running = start(cache, text(300))
    running.fill()
    attach(cache, running.lease, 256)
    cache.check(running.pages[4:])
    spoil(cache, running)
    with pytest.raises(EngineError, match=message):
        cache.check(running.pages[4:])


def test_a_lease_of_what_is_not_cached_is_noticed() -> None:
    cache = cache_of()
    running = start(cache, text(300))
    cache._roots.clear()
    with pytest.raises(EngineError, match="a lease shares pages that are not cached"):
        cache.check(running.pages)


def test_the_figures_of_a_conversation() -> None:
    cache, prompt = cache_of(), text(3_000)
    serve(cache, prompt)
    serve(cache, (*prompt, *text(100, 5)))
    figures = cache.figures
    assert (figures.queries, figures.hits) == (6_100, 2_944)
    assert figures.reasons == {"empty": 1, "hit": 1}
    assert (figures.pages, figures.snapshots) == (48, 7)


# ---------------------------------------------------------------------------------------- numbers


def test_numbers_may_begin_behind_others() -> None:
    numbers = Numbers(3, "snapshots", first=40)
    assert sorted(numbers.take(3)) == [40, 41, 42] == sorted(numbers.lent)
    with pytest.raises(EngineError, match=r"\[39\] are given back"):
        numbers.give_back([39])
    numbers.give_back([41])
    assert numbers.lent == {40, 42}
    numbers.check()
