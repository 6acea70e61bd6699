"""Faults planted in the real code, one at a time: the conversations that show that what is shipped
changes nothing must fail with each of them.
"""

from __future__ import annotations
import __future__

import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import Tensor

from conversations import CARRIED, DECODED_BOUND, SHIPPED, Script, Setting, check, script
from nybble.engine.drafting import Drafting
from nybble.engine.engine import Engine
from nybble.engine.model_runner import ModelRunner
from nybble.engine.prefix import Hit, Lease, PrefixCache
from nybble.engine.remembering import Remembering
from nybble.engine.runner import Work
from nybble.engine.scheduler import Scheduler
from nybble.engine.step_inputs import StepInputs, written_states
from nybble.kernels import dispatch
from nybble.models.model import MTP_LAYER

pytestmark = pytest.mark.skipif(not dispatch.machine_isas(), reason="no compiled kernels")

Plant = Callable[[pytest.MonkeyPatch], None]


def instead(owner: type, name: str, old: str, new: str) -> Plant:
    """A method, with one place of its text changed."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        method: Any = inspect.getattr_static(owner, name)
        method = method.fget if isinstance(method, property) else method
        source = textwrap.dedent(inspect.getsource(method))
        assert source.count(old) == 1, f"{owner.__name__}.{name} does not have {old!r} once"
        flags = __future__.annotations.compiler_flag
        code = compile(source.replace(old, new), f"<planted {name}>", "exec", flags)
        made: dict[str, Any] = {}
        exec(code, sys.modules[owner.__module__].__dict__, made)
        monkeypatch.setattr(owner, name, made[name])

    return plant


# ------------------------------------------------------------------------ what a runner leaves out


def is_hit(work: Work) -> bool:
    """Whether a work begins from a state that is not the sequence's own."""
    return work.length > 0 and all(work.slot != slot for _, slot in written_states(work))


def around(name: str, change: Callable[[ModelRunner, Sequence[Work]], None]) -> Plant:
    """A forward of the runner, with something done to its memory before it, or `after` it."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        forward = ModelRunner.forward

        def changed(self: ModelRunner, works: Sequence[Work]) -> Tensor:
            if name == "before":
                change(self, works)
            logits = forward(self, works)
            if name == "after":
                change(self, works)
            return logits

        monkeypatch.setattr(ModelRunner, "forward", changed)

    return plant


def lose_convolution(runner: ModelRunner, works: Sequence[Work]) -> None:
    """The convolution begins with what the sequence's own slot holds."""
    for work in filter(is_hit, works):
        for layer in runner.states.layers.values():
            layer.conv[work.slot] = layer.conv[work.writes[-1][1]]


def keep_last_convolution(runner: ModelRunner, works: Sequence[Work]) -> None:
    """Of all positions that are verified, the convolution's last state stays."""
    for work in works:
        for _, slot in work.writes[:-1] if work.is_recurrent else ():
            for layer in runner.states.layers.values():
                layer.conv[slot] = layer.conv[work.writes[-1][1]]


def lose_entries(runner: ModelRunner, works: Sequence[Work]) -> None:
    """The pages of a hit hold nothing of the MTP head."""
    for work in filter(is_hit, works):
        pages = list(work.pages[: work.length // runner.pages.page_tokens])
        layer = runner.pages.layers[MTP_LAYER]
        layer.keys[pages] = layer.values[pages] = 0


def lose_hidden(runner: ModelRunner, works: Sequence[Work]) -> None:
    """A hit comes without the hidden state of its last token."""
    assert runner.states.hidden is not None
    for work in filter(is_hit, works):
        runner.states.hidden[work.slot] = 0


# ------------------------------------------------------------------------- what a cache mistakes


def ignore_salts(monkeypatch: pytest.MonkeyPatch) -> None:
    find, begin = PrefixCache.find, PrefixCache.begin

    def found(
        self: PrefixCache, prompt: Sequence[int], salt: bytes, *rest: Any, **named: Any
    ) -> Hit:
        return find(self, prompt, b"", *rest, **named)

    def begun(self: PrefixCache, hit: Hit | None, salt: bytes, **named: Any) -> Lease:
        return begin(self, hit, b"", **named)

    monkeypatch.setattr(PrefixCache, "find", found)
    monkeypatch.setattr(PrefixCache, "begin", begun)


def share_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot's slot is lent to another, and the cache goes on to offer it."""
    monkeypatch.setattr(PrefixCache, "check", lambda self, *rest: None)
    detach = PrefixCache._detach

    def kept(self: PrefixCache, node: Any) -> int:
        slot = detach(self, node)
        node.snapshot = slot
        return slot

    monkeypatch.setattr(PrefixCache, "_detach", kept)


FAULTS: dict[str, Plant] = {
    "the convolution is not restored by a hit": around("before", lose_convolution),
    "the convolution is not rolled back": around("after", keep_last_convolution),
    "a snapshot of a prompt is one token late": instead(
        StepInputs,
        "fill",
        "writes[at + count - 1]",
        "writes[at + count - (count == len(work.tokens))]",
    ),
    "a snapshot of generated text is one token late": instead(
        Remembering,
        "_slot_after",
        "state.slots[length - share.work.length - 1]",
        "state.slots[min(length - share.work.length, len(state.slots) - 1)]",
    ),
    "entries of the MTP head are left out of a hit": around("before", lose_entries),
    "the hidden state is left out of a hit": around("before", lose_hidden),
    "the rollback index is one too low": instead(
        Scheduler, "accept", "state.slot + 1", "state.slot"
    ),
    "the rollback index is one too high": instead(
        Scheduler, "accept", "state.slot + 1", "state.slot + 2"
    ),
    "a snapshot is offered after its eviction": share_slots,
    "salts are ignored": ignore_salts,
    "drafts are accepted unseen": instead(
        Engine, "_follow", "choice.token == pick.drafts[0]", "True"
    ),
    "what decoding left is called exact": instead(
        Remembering, "_offer_pages", "(end <= prompt or not self.cache.has_states)", "True"
    ),
    "penalties do not see the draft before": instead(
        Engine, "_sample", "if sequence.is_memoryless else 1", ""
    ),
    "entries of rejected drafts stay": instead(
        Drafting,
        "propose",
        "+= len(ask.guess.tokens)",
        "+= len(ask.guess.tokens) + max(0, len(drafts) - 1)",
    ),
    "a hit goes on in the snapshot itself": instead(
        Scheduler,
        "_share",
        "(end, state.slots[0])",
        "(end, state.slots[0] if sequence.source is None else sequence.source)",
    ),
    "a hit may end where there is no snapshot": instead(
        PrefixCache, "_depth", "path[depth - 1].snapshot is None", "False"
    ),
    "noise is that of the step, not of the position": instead(
        Engine, "_sample", "ahead += range(pick.rows)", "ahead += [0] * pick.rows"
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {setting: script(CARRIED, setting.kv) for setting in SHIPPED}
    FAULTS[name](monkeypatch)
    with pytest.raises(AssertionError):
        check_all(asked)


def check_all(asked: dict[Setting, Script]) -> None:
    for setting, said in asked.items():
        check(setting, said, DECODED_BOUND)
