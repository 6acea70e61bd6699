"""`nybble perplexity`, `nybble eval` and `nybble reference`: a model on a text, two models on the
same text, and what makes the second possible without the first."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import nybble
from nybble.api.calibrated import refuse_calibrated_on
from nybble.api.extras import needs_torch
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import CheckpointError, EvaluationError, TextError
from nybble.kernels.compute import Compute, Precision
from nybble.kernels.dispatch import choose, default_threads
from nybble.machine import available_bytes
from nybble.progress import Progress

if TYPE_CHECKING:
    from nybble.evaluate.divergence import Divergence
    from nybble.evaluate.pack import Pack
    from nybble.evaluate.perplexity import Perplexity
    from nybble.evaluate.report import Conditions, Report
    from nybble.evaluate.score import TokenDivergence
    from nybble.evaluate.sources import PackedSource, StreamedSource
    from nybble.evaluate.windows import Text, Window
    from nybble.models.model import Model
    from nybble.text.tokenizer import Tokenizer

PACK_FILE = "pack.json"
KvDtype = Literal["bf16", "f32"]


@dataclass(frozen=True, slots=True)
class Protocol:
    """What is scored, and how it is computed.

    Text: `text` is a UTF-8 file, else `suite` names one that comes along (wikitext2). Windows:
    `convention` is "windows" (the default), "llamacpp" or "sliding" (with `stride`), of `length`
    tokens (512), of which `limit` keeps the first ones. A reference pack brings its own text and
    windows: what is None follows it, anything else must agree. `precision` is
    that of activations in matmuls, `kv_dtype` of cached keys and values. `simulate` rounds the
    inputs of linears as the checkpoint declares for serving. `spill` is a folder for hidden states
    that memory should not hold; an interrupted run goes on from it.
    """

    text: Path | None = None
    suite: str | None = None
    convention: str | None = None
    length: int | None = None
    stride: int | None = None
    limit: int | None = None
    precision: Precision = "bf16"
    kv_dtype: KvDtype = "bf16"
    simulate: bool = True
    threads: int | None = None
    spill: Path | None = None

    @property
    def compute(self) -> Compute:
        """For every kernel."""
        return Compute(self.precision, self.threads or default_threads())

    def settled(self) -> Settled:
        """With the defaults for what was left open."""
        return Settled(self.convention or "windows", self.length or 512, self.stride)


@dataclass(frozen=True, slots=True)
class Settled:
    """How a text becomes windows, decided."""

    convention: str
    length: int
    stride: int | None


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """A perplexity with its conditions, and what it cost."""

    report: Report
    perplexity: Perplexity
    notes: tuple[str, ...]
    seconds: float

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.perplexity/1`, with the notes."""
        return {**self.report.as_json(), "notes": list(self.notes)}


@dataclass(frozen=True, slots=True)
class EvalResult:
    """A divergence with its conditions, what it cost, and what differed without deciding anything.

    `figures` are the numbers of every token, to compare two candidates pairwise.
    """

    report: Report
    divergence: Divergence
    figures: TokenDivergence
    notes: tuple[str, ...]
    seconds: float

    def as_json(self) -> dict[str, object]:
        """The JSON document `nybble.eval/1`, with the notes."""
        return {**self.report.as_json(), "notes": list(self.notes)}


@dataclass(frozen=True, slots=True)
class ReferenceResult:
    """A reference pack that was made."""

    out: Path
    conditions: Conditions
    perplexity: Perplexity
    nbytes: int
    has_head: bool
    seconds: float

    def as_json(self) -> dict[str, object]:
        """The JSON document of `nybble reference --json`."""
        return {
            "schema": "nybble.reference-made/1",
            "out": str(self.out),
            "bytes": self.nbytes,
            "has_head": self.has_head,
            "conditions": self.conditions.as_json(),
            "perplexity": self.perplexity.as_json(),
        }


# ------------------------------------------------------------------------------------- the commands


def perplexity(
    model: str | PathLike[str], protocol: Protocol | None = None, progress: Progress | None = None
) -> PerplexityResult:
    """The perplexity of a checkpoint folder, quantized or not, for a model larger than memory too.

    Raises MissingExtra without torch, TextError for a text that cannot be scored, EngineError and
    EvaluationError for NaN, naming where.
    """
    needs_torch("perplexity")
    from nybble.evaluate.perplexity import measure_perplexity
    from nybble.evaluate.report import perplexity_report
    from nybble.evaluate.score import score

    protocol, progress = protocol or Protocol(), progress or Progress()
    began = time.perf_counter()
    with _opened(Path(model)) as subject:
        text, settled = _text(protocol), protocol.settled()
        windows = subject.windows(text, protocol)
        subject.refuse_calibrated(windows, text.name)
        with subject.source(windows, protocol, progress, "score") as source:
            source.run()
            scores = score(source, windows, source.stream.mode, progress)
        found = measure_perplexity(
            scores.nll, scores.window, scored_bytes=subject.scored_bytes(windows)
        )
        report = perplexity_report(subject.conditions(text, windows, protocol, settled), found)
        notes = subject.notes(protocol)
    return PerplexityResult(report, found, notes, time.perf_counter() - began)


def evaluate(
    candidate: str | PathLike[str],
    reference: str | PathLike[str],
    protocol: Protocol | None = None,
    progress: Progress | None = None,
    *,
    head: str | PathLike[str] | None = None,
) -> EvalResult:
    """KL(reference || candidate) over the whole vocabulary, and all that goes with it.

    `reference` is a checkpoint folder or a reference pack, which brings its windows along; `head`
    is the folder with the output head of a pack that was made without. Raises EvaluationError if
    the two do not belong together, and what `perplexity` raises.
    """
    needs_torch("eval")
    from nybble.evaluate.divergence import summarize
    from nybble.evaluate.report import eval_report
    from nybble.evaluate.score import compare

    protocol, progress = protocol or Protocol(), progress or Progress()
    began = time.perf_counter()
    with _opened(Path(candidate)) as ours:
        with _referenced(Path(reference), ours, protocol, progress, head) as known:
            windows = known.windows
            _refuse_strangers(ours, known)
            ours.refuse_calibrated(windows, known.text.name)
            with ours.source(windows, protocol, progress, "candidate") as source:
                ours.model.weights.check()  # before hours of work on the reference
                known.run()
                source.run()
                figures = compare(known.source, source, windows, source.stream.mode, progress)
        conditions = replace(
            ours.conditions(known.text, windows, protocol, known.settled),
            reference=known.conditions.model,
            reference_sha256=known.conditions.weights_sha256,
        )
        stats = summarize(figures)
        notes = (*known.notes, *ours.notes(protocol))
    return EvalResult(
        eval_report(conditions, stats), stats, figures, notes, time.perf_counter() - began
    )


def reference(
    model: str | PathLike[str],
    out: str | PathLike[str],
    protocol: Protocol | None = None,
    progress: Progress | None = None,
    *,
    has_head: bool = True,
) -> ReferenceResult:
    """Make a reference pack of an unquantized model: final hidden states, tokens, and the head.

    Whoever has it computes the exact divergence of any quantization of the model without its
    weights. Raises EvaluationError for a model whose head is not BF16, and what writing raises.
    """
    needs_torch("reference")
    import ml_dtypes
    import numpy as np

    from nybble.evaluate.pack import PackWriter
    from nybble.evaluate.perplexity import measure_perplexity
    from nybble.evaluate.score import score

    protocol, progress = protocol or Protocol(), progress or Progress()
    if protocol.precision != "bf16":
        raise EvaluationError("a reference pack holds BF16 hidden states; use precision bf16")
    began = time.perf_counter()
    with _opened(Path(model)) as subject:
        _refuse_quantized(subject)
        if os.path.lexists(out):
            raise CheckpointError(f"{out}: exists; name another output, or remove it")
        weight = subject.model.head.weight.weights[0]
        if not isinstance(weight, np.ndarray) or weight.dtype != ml_dtypes.bfloat16:
            raise EvaluationError(
                f"{model}: the output head is {getattr(weight, 'dtype', 'quantized')}; a reference "
                "pack is made of the BF16 original"
            )
        text = _text(protocol)
        windows = subject.windows(text, protocol)
        conditions = subject.conditions(text, windows, protocol, protocol.settled())
        with subject.source(windows, protocol, progress, "reference") as source:
            source.run()
            # Only now: what an interruption of the long part leaves is the spill, no half a pack.
            with PackWriter(Path(out), conditions, windows, weight, has_head=has_head) as writer:
                for _, normed in source.normed():
                    writer.add(normed.numpy().astype(ml_dtypes.bfloat16))
                scores = score(source, windows, source.stream.mode, progress)
                writer.finish()
        found = measure_perplexity(
            scores.nll, scores.window, scored_bytes=subject.scored_bytes(windows)
        )
    nbytes = sum(f.stat().st_size for f in Path(out).iterdir())
    return ReferenceResult(
        Path(out), conditions, found, nbytes, has_head, time.perf_counter() - began
    )


# ------------------------------------------------------------------------------------------ parts


@dataclass(frozen=True, slots=True)
class _Named:
    """What conditions say of a text; of a pack's, nothing more is known."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class _Subject:
    """A checkpoint that is open, with its network and its tokenizer."""

    checkpoint: Checkpoint
    model: Model
    tokenizer: Tokenizer

    def windows(self, text: Text, protocol: Protocol) -> tuple[Window, ...]:
        """The text as windows of this tokenizer's ids. Raises TextError for windows longer than the
        model's context."""
        from nybble.evaluate.windows import make_windows

        ids = self.tokenizer.encode(text.content, parse_special=False)
        settled, context = protocol.settled(), self.model.network.context
        if settled.length > context:
            raise TextError(
                f"windows of {settled.length:,} tokens are longer than the context of "
                f"{self.checkpoint.path} (max_position_embeddings {context:,}); use --length "
                f"{context} or less"
            )
        return make_windows(
            ids,
            settled.length,
            settled.convention,
            stride=settled.stride,
            bos=self.tokenizer.bos_id if settled.convention == "llamacpp" else None,
            limit=protocol.limit,
        )

    def refuse_calibrated(self, windows: tuple[Window, ...], name: str) -> None:
        """Raise EvaluationError if this checkpoint was calibrated on a passage of the windows."""
        ids = [i for w in windows for i in w.tokens.tolist()]
        refuse_calibrated_on(self.checkpoint.path, self.tokenizer.decode(ids), name)

    def notes(self, protocol: Protocol) -> tuple[str, ...]:
        """What is declared of serving and not computed here."""
        from nybble.checkpoint.dialects import declaration_of

        declared = declaration_of(self.checkpoint).kv_cache
        if not declared:
            return ()
        return (
            f"{self.checkpoint.path.name} declares its KV cache in {declared}; it was computed in "
            f"{protocol.kv_dtype}",
        )

    def scored_bytes(self, windows: tuple[Window, ...]) -> int:
        """UTF-8 bytes of the scored tokens' text."""
        return sum(
            len(self.tokenizer.decode(w.targets.tolist(), skip_special=False).encode())
            for w in windows
        )

    @contextmanager
    def source(
        self, windows: tuple[Window, ...], protocol: Protocol, progress: Progress, title: str
    ) -> Iterator[StreamedSource]:
        """The hidden states of the windows, planned; `run` computes them."""
        from nybble.evaluate.score import logits_bytes
        from nybble.evaluate.sources import StreamedSource
        from nybble.models.linear import Mode

        source = StreamedSource(
            self.model,
            windows,
            Mode(protocol.compute, simulate=protocol.simulate),
            page_dtype=protocol.kv_dtype,
            title=title,
            progress=progress,
            spill=None if protocol.spill is None else protocol.spill / title,
            limit_bytes=available_bytes(),
        )
        plan = source.stream.plan
        disk = f", {plan.disk_bytes / 2**30:.2f} GiB of disk" if plan.disk_bytes else ""
        needed = plan.private_bytes + 2 * logits_bytes(self.model.network.dims.vocab)
        progress.say(
            f"{title}: {self.checkpoint.path}, {plan.tokens:,} tokens in {len(windows):,} windows, "
            f"one layer at a time: {needed / 2**30:.2f} GiB of memory, logits included{disk}"
        )
        yield source
        source.close()

    def conditions(
        self,
        text: Text | _Named,
        windows: tuple[Window, ...],
        protocol: Protocol,
        settled: Settled,
    ) -> Conditions:
        """What this model's figures depend on."""
        import torch

        from nybble.evaluate.report import Conditions
        from nybble.evaluate.windows import count_scored

        chosen = choose()
        return Conditions(
            model=self.checkpoint.path.resolve().name,
            weights_sha256=self.checkpoint.fingerprint(),
            config_sha256=self.checkpoint.config_sha256,
            tokenizer_sha256=self.tokenizer.sha256,
            text=text.name,
            text_sha256=text.sha256,
            convention=settled.convention,
            length=settled.length,
            stride=settled.stride,
            bos=self.tokenizer.bos_id if settled.convention == "llamacpp" else None,
            tokens=sum(len(w.tokens) for w in windows),
            windows=len(windows),
            scored=count_scored(windows),
            precision=protocol.precision,
            kv_dtype=protocol.kv_dtype,
            activations=self._activations() if protocol.simulate else "none",
            reference=None,
            reference_sha256=None,
            nybble=nybble.__version__,
            torch=torch.__version__,
            isa=chosen.isa,
            kernels=chosen.backend,
            threads=protocol.compute.threads,
        )

    def _activations(self) -> str:
        """The kinds of quantized inputs that the checkpoint declares, and that are simulated."""
        declared = (m.declared for m in self.model.weights.contents.modules if m.kind.is_quantized)
        kinds = {d.activation for d in declared if d is not None and d.activation}
        return ", ".join(sorted(kinds - {"BF16"})) or "none"


@contextmanager
def _opened(folder: Path) -> Iterator[_Subject]:
    from nybble.models.model import Model
    from nybble.text.tokenizer import Tokenizer

    with Checkpoint.open(folder) as checkpoint:
        yield _Subject(checkpoint, Model(checkpoint), Tokenizer.open(folder))


def _text(protocol: Protocol) -> Text:
    from nybble.evaluate.windows import load_suite, read_text

    if protocol.text is not None:
        return read_text(protocol.text)
    return load_suite(protocol.suite or "wikitext2")


@dataclass(frozen=True, slots=True)
class _Known:
    """The reference's side of a comparison."""

    windows: tuple[Window, ...]
    text: Text | _Named
    settled: Settled
    conditions: Conditions
    source: StreamedSource | PackedSource
    sizes: dict[str, int]
    notes: tuple[str, ...]

    def run(self) -> None:
        """Compute a model's hidden states; a pack has them."""
        from nybble.evaluate.sources import StreamedSource

        if isinstance(self.source, StreamedSource):
            self.source.model.weights.check()
            self.source.run()


@contextmanager
def _referenced(
    path: Path,
    ours: _Subject,
    protocol: Protocol,
    progress: Progress,
    head: str | PathLike[str] | None,
) -> Iterator[_Known]:
    if path.name.endswith(".partial"):
        raise EvaluationError(f"{path}: is an unfinished reference pack; make it again")
    if (path / PACK_FILE).exists():
        from nybble.evaluate.pack import Pack

        with Pack.open(path) as pack:
            yield _from_pack(pack, ours, protocol, head)
        return
    if head is not None:
        raise EvaluationError(
            f"--head is for a pack made --without-head, and {path} is a model; leave it out"
        )
    with _opened(path) as theirs:
        text, settled = _text(protocol), protocol.settled()
        windows = theirs.windows(text, protocol)
        notes = _same_tokens(ours, theirs, text, windows, protocol)
        if any(m.kind.is_quantized for m in theirs.model.weights.contents.modules):
            notes = (*notes, f"the reference {path.name} is quantized itself")
        with theirs.source(windows, protocol, progress, "reference") as source:
            yield _Known(
                windows,
                text,
                settled,
                theirs.conditions(text, windows, protocol, settled),
                source,
                _sizes(theirs.model),
                notes,
            )


def _sizes(model: Model) -> dict[str, int]:
    """What two models of one family member have in common."""
    d = model.network.dims
    names = ("vocab", "hidden", "layers", "heads", "kv_heads", "head_dim", "experts")
    return {name: getattr(d, name) for name in names}


def _refuse_strangers(ours: _Subject, known: _Known) -> None:
    """Raise EvaluationError unless the two can be forms of one model."""
    mine = _sizes(ours.model)
    differing = [f"{n} {mine[n]:,} against {v:,}" for n, v in known.sizes.items() if mine[n] != v]
    if differing:
        raise EvaluationError(
            f"{ours.checkpoint.path} is no form of the reference {known.conditions.model}: "
            f"{'; '.join(differing)}"
        )


def _refuse_quantized(subject: _Subject) -> None:
    for module in subject.model.weights.contents.modules:
        if module.kind.is_quantized:
            raise EvaluationError(
                f"{subject.checkpoint.path}: {module.name} is {module.kind.held}; a reference pack "
                "is made of the BF16 original"
            )


def _same_tokens(
    ours: _Subject, theirs: _Subject, text: Text, windows: tuple[Window, ...], protocol: Protocol
) -> tuple[str, ...]:
    """Raise EvaluationError unless both tokenizers read the text alike; a note if they differ."""
    import numpy as np

    if ours.tokenizer.sha256 == theirs.tokenizer.sha256:
        return ()
    found = ours.windows(text, protocol)
    if len(found) != len(windows) or any(
        not np.array_equal(a.tokens, b.tokens) for a, b in zip(found, windows, strict=True)
    ):
        raise EvaluationError(
            f"the tokenizers of {ours.checkpoint.path} and {theirs.checkpoint.path} read "
            f"{text.name} differently: they are not of one model, or a tool changed tokenizer.json"
        )
    return ("tokenizer.json differs between the two, but gives the same ids for this text",)


def _from_pack(
    pack: Pack, ours: _Subject, protocol: Protocol, head: str | PathLike[str] | None
) -> _Known:
    from nybble.evaluate.report import refuse_unequal_conditions
    from nybble.evaluate.sources import PackedSource

    made = pack.conditions
    if made.tokenizer_sha256 != ours.tokenizer.sha256:
        raise EvaluationError(
            f"{pack.path}: was made with another tokenizer.json than that of "
            f"{ours.checkpoint.path}; its token ids would mean other words"
        )
    settled = Settled(made.convention, made.length, made.stride)
    _refuse_other_windows(pack, protocol)
    if protocol.text is not None or protocol.suite is not None:
        text = _text(protocol)
        if text.sha256 != made.text_sha256:
            raise TextError(
                f"{text.name}: is not the text of the pack ({made.text}); leave --text and --suite "
                "out, the pack brings its own tokens"
            )
    named = _Named(made.text, made.text_sha256)
    notes = refuse_unequal_conditions(
        ours.conditions(named, pack.windows, protocol, settled), made, may_differ=("activations",)
    )
    notes = tuple(note for note in notes if not note.startswith("activations:"))
    pack.verify()
    found = None
    if head is not None:
        if pack.has_head:
            raise EvaluationError(f"{pack.path}: has its output head with it; leave --head out")
        with Checkpoint.open(Path(head)) as checkpoint:
            from nybble.models.model import Model

            found = Model(checkpoint).head
    windows = pack.windows[: protocol.limit]
    sizes = {"vocab": pack.vocabulary, "hidden": pack.hidden_size}
    return _Known(
        windows, named, settled, made, PackedSource(pack, found, len(windows)), sizes, notes
    )


def _refuse_other_windows(pack: Pack, protocol: Protocol) -> None:
    """Raise EvaluationError for windows asked for that are not those of the pack."""
    for name in ("convention", "length", "stride"):
        asked, made = getattr(protocol, name), getattr(pack.conditions, name)
        if asked is not None and asked != made:
            raise EvaluationError(
                f"{pack.path}: was made with {name} {made}, and {asked} was asked for; leave it "
                "out, the pack brings its own windows"
            )
