"""What sequences leave in the prefix cache while they run: pages as they fill, and states where
others may begin. Knows numbers of pages and slots, no tensor.
"""

from __future__ import annotations

from collections.abc import Callable

from nybble.engine.prefix import PrefixCache
from nybble.engine.scheduler import Share

#: Copies a recurrent state from a slot to another.
CopySlot = Callable[[int, int], None]


class Remembering:
    """Offers to a cache what shares have computed. `page_tokens` as in the engine."""

    def __init__(self, cache: PrefixCache, page_tokens: int, copy: CopySlot) -> None:
        self.cache, self._page_tokens, self._copy = cache, page_tokens, copy

    def keep(self, share: Share) -> None:
        """After a step, drafting included, while the sequence still holds what it computed."""
        sequence, lease = share.sequence, share.sequence.lease
        if lease is None:
            self.cache.cancel([slot for _, slot in share.snapshots])
            return
        self._offer_pages(share)
        state, left = sequence.state, list(share.snapshots)
        try:
            while left:
                length, slot = left[0]
                if length == state.length:
                    self._copy(state.slots[state.slot], slot)
                left.pop(0)
                self.cache.attach(lease, length, slot)
        finally:  # a copy may fail
            self.cache.cancel([slot for _, slot in left])
        if share.work.is_recurrent:
            self._keep_decoded(share)

    def _offer_pages(self, share: Share) -> None:
        """Pages that are full now. Where there are recurrent states, those of generated tokens are
        not what chunks would make."""
        sequence, size = share.sequence, self._page_tokens
        lease, state, prompt = sequence.lease, sequence.state, len(sequence.request.prompt)
        assert lease is not None
        for number in range(lease.length // size, state.length // size):
            if not lease.is_open:
                return
            end = (number + 1) * size
            state.pages[number] = self.cache.extend(
                lease,
                sequence.tokens(end - size, end),
                state.pages[number],
                is_exact=(end <= prompt or not self.cache.has_states),
                has_mtp=state.mtp_length >= end,
            )
            if state.mtp_length >= 0 and not lease.has_mtp:  # what others made lacks entries
                state.mtp_length, state.drafts = -1, []

    def _keep_decoded(self, share: Share) -> None:
        """A snapshot of the state of generated text, for the next turn of a conversation: at the
        last multiple that was passed. The one before it goes."""
        cache, state, lease = self.cache, share.sequence.state, share.sequence.lease
        before = share.work.length
        length = state.length // cache.step * cache.step
        if length <= before or not cache.has_states or cache.is_exact or lease is None:
            return
        source = self._slot_after(share, length)
        if not lease.is_open or lease.length < length or source is None:
            return
        slot = cache.renew(lease)
        if slot is not None:
            try:
                self._copy(source, slot)
            except BaseException:
                cache.cancel([slot])
                raise
            cache.attach(lease, length, slot, is_rolling=True)

    def _slot_after(self, share: Share, length: int) -> int | None:
        """Where the state after so many tokens lies; of a replay, the last one alone is left."""
        state = share.sequence.state
        if len(share.work.writes) == len(share.work.tokens):
            return state.slots[length - share.work.length - 1]
        return state.slots[state.slot] if length == state.length else None
