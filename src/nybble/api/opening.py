"""Opening a checkpoint to generate from it: options, memory, and an engine with all its parts.

What is planned, what is found and what is asked for meet here, and nothing that was asked for is
changed in silence.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from nybble.api.extras import needs_torch
from nybble.checkpoint.dialects import declaration_of
from nybble.checkpoint.reader import Checkpoint
from nybble.engine.scheduler import MOST_DRAFTS, EngineOptions
from nybble.errors import ContextTooLong, EngineError, ModelError
from nybble.families import Dimensions
from nybble.kernels.compute import PRECISIONS, Compute, Precision
from nybble.kernels.dispatch import default_threads
from nybble.machine import available_bytes
from nybble.models.numbers import Numbers
from nybble.plan.memory import EngineMemory, default_budget, most_bytes, plan_memory
from nybble.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nybble.engine.drafter import Drafter
    from nybble.engine.engine import Engine
    from nybble.engine.model_runner import ModelRunner
    from nybble.engine.prefix import PrefixCache
    from nybble.models.model import Model
    from nybble.models.state import PagePool

log = logging.getLogger("nybble")

CacheDtype = Literal["auto", "bf16", "fp8", "f32"]
CACHE_DTYPES = ("auto", "bf16", "fp8", "f32")
DraftSource = Literal["auto", "mtp", "ngram", "off"]
DRAFT_SOURCES = ("auto", "mtp", "ngram", "off")
#: Drafts of a sequence at most where nobody said how many: beyond three, even a good head's are
#: rarely all right.
ADAPTIVE_DRAFTS = 3
MOST_THREADS = 256


@dataclass(frozen=True, slots=True)
class OpenOptions:
    """How a checkpoint is opened to generate from it.

    `memory` is what pages and recurrent states may take, in GiB; None goes by what is free.
    `kv_cache_dtype` "auto" follows the checkpoint: FP8 where it declares its KV cache so (with the
    scales it has, else 1.0, as other engines do), else BF16. `max_context` None is the model's own.

    `prefix_cache` keeps what prompts and answers left, for prompts that begin alike; with `exact`
    only what reading a prompt made, so that a prompt has the same bits with it and without.
    `snapshot_memory`, in GiB, is the part of `memory` for copies of recurrent states to go on from;
    None is chosen. `draft` is who guesses tokens ahead ("auto": the checkpoint's MTP head, else
    what followed in the text before), `draft_tokens` how many of them a step verifies for each
    sequence: None as it pays, at most ADAPTIVE_DRAFTS; 0 none. Neither changes a token.
    """

    memory: float | None = None
    kv_cache_dtype: CacheDtype = "auto"
    max_sequences: int = 32
    max_batched_tokens: int = 1024
    max_context: int | None = None
    precision: Precision = "bf16"
    threads: int | None = None
    prefix_cache: bool = True
    exact: bool = False
    draft: DraftSource = "auto"
    draft_tokens: int | None = None
    snapshot_memory: float | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("kv_cache_dtype", CACHE_DTYPES),
            ("precision", PRECISIONS),
            ("draft", DRAFT_SOURCES),
        ):
            if getattr(self, name) not in known:
                raise EngineError(
                    f"{name} must be one of {', '.join(known)}, found {getattr(self, name)!r}"
                )
        self._check_sizes()
        self._check_reuse()
        self.engine()

    def _check_sizes(self) -> None:
        for name, least, most in (
            ("max_context", 2, 2**31),
            ("threads", 1, MOST_THREADS),
            ("draft_tokens", 0, MOST_DRAFTS),
        ):
            value = getattr(self, name)
            if value is not None and not (_is_whole(value) and least <= value <= most):
                raise EngineError(
                    f"{name} must be a whole number from {least} to {most:,}, found {value!r}"
                )
        if self.memory is not None and not (_is_real(self.memory) and 0 < self.memory < 2**20):
            raise EngineError(
                f"memory must be a number of GiB above 0 and below 2^20, found {self.memory!r}"
            )
        own = self.snapshot_memory
        if own is not None and not (_is_real(own) and 0 <= own < 2**20):
            raise EngineError(
                f"snapshot_memory must be a number of GiB from 0 to below 2^20, found {own!r}"
            )

    def _check_reuse(self) -> None:
        for name in ("prefix_cache", "exact"):
            if not isinstance(getattr(self, name), bool):
                raise EngineError(f"{name} must be true or false, found {getattr(self, name)!r}")
        if self.draft == "off" and self.draft_tokens:
            raise EngineError(
                f"draft_tokens {self.draft_tokens} with draft off: nobody is to guess them; leave "
                "one of the two out"
            )
        if self.snapshot_memory and not self.prefix_cache:
            raise EngineError(
                f"snapshot_memory {self.snapshot_memory} without the prefix cache: nothing would "
                "read the snapshots; leave one of the two out"
            )

    @property
    def most_drafts(self) -> int:
        """How many tokens are guessed ahead at most, if there is somebody to guess them."""
        if self.draft == "off":
            return 0
        return ADAPTIVE_DRAFTS if self.draft_tokens is None else self.draft_tokens

    def engine(self, drafts: int | None = None) -> EngineOptions:
        """The part that is the scheduler's; `drafts` where memory holds fewer than were asked for.
        Raises EngineError for sizes that cannot be."""
        return EngineOptions(
            self.max_sequences,
            self.max_batched_tokens,
            draft_tokens=self.most_drafts if drafts is None else drafts,
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return _is_whole(value) or isinstance(value, float)


@dataclass(frozen=True, slots=True)
class Opened:
    """An engine, and what was made of the options: how its memory is divided, and who guesses
    tokens ahead, "off" for nobody."""

    engine: Engine
    memory: EngineMemory
    source: DraftSource

    @property
    def ahead(self) -> str:
        """What spares work, in a line: the prefix cache and drafting."""
        drafts = self.engine.options.draft_tokens
        drafting = f"{self.source}, up to {_tokens(drafts)}" if drafts else "off"
        return f"prefix cache: {self._cache}; drafting: {drafting}"

    @property
    def _cache(self) -> str:
        cache, memory = self.engine.scheduler.cache, self.memory
        if cache is None:
            return "off"
        exact = ", exact" if cache.is_exact else ""
        if not memory.has_states:
            return f"pages alone, no recurrent states{exact}"
        if not memory.snapshots:
            return f"no snapshots of recurrent states, so nothing is found{exact}"
        return f"{memory.snapshots} snapshots of {memory.slot_bytes / 2**20:.1f} MiB{exact}"


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"


def open_engine(folder: str | PathLike[str], options: OpenOptions | None = None) -> Engine:
    """The engine of `open_checkpoint`."""
    return open_checkpoint(folder, options).engine


def open_checkpoint(folder: str | PathLike[str], options: OpenOptions | None = None) -> Opened:
    """An engine for a local checkpoint folder; its weights stay mapped as long as it lives.

    Raises MissingExtra without torch, DoesNotFit for a memory budget that holds no sequence,
    ModelError for MTP drafts from a checkpoint without that head, and what opening a checkpoint,
    its tokenizer and its model raise.
    """
    needs_torch("generating")
    from nybble.models.model import Model

    options = options or OpenOptions()
    checkpoint = Checkpoint.open(Path(folder))
    tokenizer = Tokenizer.open(checkpoint.path)
    model = Model(checkpoint)
    source = draft_source(options, checkpoint.path, model)
    context = _context(model.network.context, options.max_context)
    dtype = _cache_dtype(checkpoint, options.kv_cache_dtype)
    memory = _plan(checkpoint, model.network.dims, context, dtype, options, source)
    if options.snapshot_memory and not memory.has_states:
        raise EngineError(
            f"snapshot_memory {options.snapshot_memory}: {checkpoint.path} has no recurrent "
            "states, so pages alone are its prefix cache; leave snapshot_memory out"
        )
    runner = _runner(model, memory, context, dtype, options)
    found = Opened(_engine(runner, tokenizer, memory, context, options, source), memory, source)
    _tell(checkpoint.path, found, dtype, options)
    return found


def draft_source(options: OpenOptions, folder: Path, model: Model) -> DraftSource:
    """Who guesses tokens ahead, "off" for nobody. Raises ModelError for an MTP head that is asked
    for and not there; one that is promised, not asked for, and not there is only told of."""
    if not options.most_drafts:
        return "off"
    if options.draft not in ("auto", "mtp"):
        return options.draft
    try:
        has_head = model.mtp is not None
    except ModelError as error:
        if options.draft == "mtp":
            raise
        log.warning(
            "%s: config.json promises an MTP head that cannot be used (%s): tokens are guessed "
            "from the text instead; `nybble repair --source` brings a lost head back",
            *(folder, error),
        )
        has_head = False
    if options.draft == "mtp" and not has_head:
        raise ModelError(
            f"{folder}: draft mtp was asked for, but its config.json promises no MTP head "
            "(mtp_num_hidden_layers); choose auto, ngram or off"
        )
    return "mtp" if has_head else "ngram"


def _runner(
    model: Model,
    memory: EngineMemory,
    context: int,
    dtype: str,
    options: OpenOptions,
) -> ModelRunner:
    from nybble.engine.model_runner import ModelRunner, StepSize

    sizes, has_mtp = options.engine(memory.drafts), memory.has_mtp
    pages = model.page_pool(memory.pages, sizes.page_tokens, dtype, has_mtp=has_mtp)
    states = model.state_pool(memory.slots + memory.snapshots, has_mtp=has_mtp)
    outputs = sizes.max_outputs(model.network.dims.vocab)
    most = StepSize(sizes.max_batched_tokens, sizes.max_sequences, outputs, context)
    compute = Compute(options.precision, options.threads or default_threads())
    return ModelRunner(model, pages, states, most, compute, has_mtp=has_mtp)


def _engine(
    runner: ModelRunner,
    tokenizer: Tokenizer,
    memory: EngineMemory,
    context: int,
    options: OpenOptions,
    source: DraftSource,
) -> Engine:
    from nybble.engine.engine import Engine
    from nybble.engine.grammar import GrammarWorker
    from nybble.engine.sampler import Sampler
    from nybble.engine.speculation import Speculation

    sizes, pages = options.engine(memory.drafts), runner.pages
    drafter = _drafter(source, runner) if memory.drafts else None
    fixed = None if options.draft_tokens is None else memory.drafts
    slots_each = memory.slots // memory.sequences
    return Engine(
        runner,
        tokenizer,
        sizes,
        pages.numbers,
        Numbers(memory.slots, "slots", each=slots_each),
        context,
        Sampler(runner.vocab, runner.mode.compute),
        GrammarWorker(tokenizer.path, runner.vocab, tokenizer.eos_ids),
        clipped=lambda: pages.clipped,
        cache=_cache(memory, pages, options) if options.prefix_cache else None,
        drafter=drafter,
        speculation=Speculation(memory.drafts, fixed) if drafter is not None else None,
        slots_each=slots_each,
    )


def _drafter(source: DraftSource, runner: ModelRunner) -> Drafter | None:
    from nybble.engine.drafter import MtpDrafter, NgramDrafter

    if source == "mtp":
        return MtpDrafter(runner)
    return NgramDrafter() if source == "ngram" else None


def _cache(memory: EngineMemory, pages: PagePool, options: OpenOptions) -> PrefixCache:
    from nybble.engine.prefix import PrefixCache

    snapshots = Numbers(memory.snapshots, "snapshots", first=memory.slots)
    return PrefixCache(
        pages.numbers,
        snapshots,
        pages.page_tokens,
        has_states=memory.has_states,
        is_exact=options.exact,
    )


def _tell(folder: Path, found: Opened, dtype: str, options: OpenOptions) -> None:
    """Say what the memory holds, and where that is less than what was asked for."""
    memory = found.memory
    size = f"{memory.total_bytes / 2**30:.2f} GiB"
    log.info(
        "%s: KV cache %s, %d pages of %d tokens, %d recurrent states, %s",
        *(folder, dtype, memory.pages, found.engine.options.page_tokens, memory.slots, size),
    )
    log.info("%s: %s", folder, found.ahead)
    if memory.sequences < options.max_sequences:
        log.warning(
            "%s: asked for %d sequences at once, memory holds the states of %d; give it more "
            "(--memory)",
            *(folder, options.max_sequences, memory.sequences),
        )
    if found.source != "off" and memory.drafts < options.most_drafts:
        log.warning(
            "%s: memory holds the states of %d drafts of a sequence, not of %d; give it more "
            "(--memory), or fewer sequences (--max-sequences)",
            *(folder, memory.drafts, options.most_drafts),
        )


def _context(own: int, asked: int | None) -> int:
    if asked is not None and asked > own:
        raise ContextTooLong(
            f"max_context {asked:,} is more than the model's own (max_position_embeddings), "
            f"{own:,}; ask for less, or extend the model in config.json (YaRN)"
        )
    return asked or own


def _cache_dtype(checkpoint: Checkpoint, asked: CacheDtype) -> str:
    """The type of the KV cache: what is asked for, else what the checkpoint declares."""
    if asked != "auto":
        return asked
    return "fp8" if declaration_of(checkpoint).kv_cache == "fp8" else "bf16"


def _plan(
    checkpoint: Checkpoint,
    dims: Dimensions,
    context: int,
    dtype: str,
    options: OpenOptions,
    source: DraftSource,
) -> EngineMemory:
    """How many pages, slots and snapshots the memory holds. Raises DoesNotFit for one too small."""
    asked = options.snapshot_memory if options.prefix_cache else 0
    sizes: _Sizes = {
        "max_sequences": options.max_sequences,
        "context": context,
        "page_tokens": options.engine().page_tokens,
        "kv_dtype": dtype,
        "has_mtp": source == "mtp",
        "drafts": 0 if source == "off" else options.most_drafts,
        "snapshot_bytes": None if asked is None else int(asked * 2**30),
        "cache": options.prefix_cache,
    }
    if options.memory is not None:
        return plan_memory(dims, budget_bytes=int(options.memory * 2**30), **sizes)
    available = available_bytes()
    if available is None:
        raise EngineError("this system does not say how much memory is free; say it with memory=")
    weights = sum(info.nbytes for info in checkpoint.tensors.values())
    budget = default_budget(available, weights, most_bytes(dims, **sizes))
    return plan_memory(dims, budget_bytes=budget, **sizes)


class _Sizes(TypedDict):
    max_sequences: int
    context: int
    page_tokens: int
    kv_dtype: str
    has_mtp: bool
    drafts: int
    snapshot_bytes: int | None
    cache: bool
