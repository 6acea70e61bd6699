"""Hostile checkpoint files: sound ones, mutated with a sense for their structure, and the readers
they are given to.

An input is a handful of files by name. A reader may end with a result or a NybbleError, within the
limits of time and memory that `watched` sets; anything else is a find. Findings are kept in
fixtures/hostile and are tried by every test run. `scripts/fuzz` runs millions.
"""

from __future__ import annotations

import atexit
import base64
import json
import random
import re
import resource
import shutil
import signal
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from nybble.check.run import run_rules, select_rules
from nybble.check.survey import Survey
from nybble.checkpoint import safetensors
from nybble.checkpoint.dialects import read_declaration
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import CheckpointError, NybbleError

ROOT = Path(__file__).parents[1]
CLEAN = ROOT / "zoo" / "clean"
FIXTURES = ROOT / "tests" / "fixtures" / "hostile"
PUBLISHED = ROOT / "tests" / "fixtures" / "configs"

#: Processor time of one input, and memory beyond what the readers and the seeds take.
TIME_LIMIT_S = 2.0
MEMORY_LIMIT = 512 << 20
#: A mutated file does not grow beyond this: size alone is not hostile.
MAX_BYTES = 1 << 20

Files = dict[str, bytes]


# ------------------------------------------------------------------------------------------ seeds


class MemoryFiles:
    """The files of a folder that is nowhere."""

    def __init__(self, files: Files) -> None:
        self.files = files

    @property
    def where(self) -> str:
        return "memory"

    @property
    def local(self) -> None:
        return None

    @property
    def habit(self) -> Any:
        from nybble.checkpoint.files import Habit

        return Habit()

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.files))

    def size(self, name: str) -> int:
        if name not in self.files:
            raise CheckpointError(f"memory/{name}: is not there")
        return len(self.files[name])

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        size = self.size(name)
        end = size if length is None else start + length
        if end > size:
            raise CheckpointError(f"memory/{name}: became {end - size} bytes shorter")
        return self.files[name][start:end]


def base(name: str) -> Files:
    """The files of a folder of zoo/clean."""
    path = CLEAN / name
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def headers_only(files: Files) -> Files:
    """The same with shards that end behind their headers."""
    out = dict(files)
    for name, data in files.items():
        if name.endswith(".safetensors"):
            out[name] = data[: 8 + int.from_bytes(data[:8], "little")]
    return out


def _small_shards() -> list[bytes]:
    entries = [
        ({}, b""),
        ({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, bytes(4)),
        (
            {
                "__metadata__": {"format": "pt"},
                "w": {"dtype": "U8", "shape": [2, 8], "data_offsets": [0, 16]},
                "w_scale": {"dtype": "F8_E4M3", "shape": [2, 1], "data_offsets": [16, 18]},
                "empty": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [18, 18]},
            },
            bytes(18),
        ),
    ]
    out = []
    for header, data in entries:
        text = json.dumps(header).encode()
        out.append(len(text).to_bytes(8, "little") + text + data)
    return out


def _gguf_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def small_gguf() -> bytes:
    """A GGUF file with a field of every type, nested arrays, and tensors of three types."""
    fields = [
        ("general.architecture", 8, _gguf_string("qwen3")),
        ("general.alignment", 4, struct.pack("<I", 32)),
        *((f"number.{kind}", kind, bytes(size)) for kind, size in _GGUF_NUMBERS.items()),
        ("texts", 9, struct.pack("<IQ", 8, 3) + b"".join(map(_gguf_string, ("a", "bé", "")))),
        ("numbers", 9, struct.pack("<IQ4i", 5, 4, 1, 2, 3, 4)),
        ("flags", 9, struct.pack("<IQ3?", 7, 3, True, False, True)),
    ]
    tensors = [("token_embd.weight", 0, (8, 4), 128), ("blk.0.attn_q.weight", 40, (64, 2), 72),
               ("norm.weight", 1, (16,), 32)]  # fmt: skip
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for key, kind, value in fields:
        out += _gguf_string(key) + struct.pack("<I", kind) + value
    at = 0
    for name, kind, shape, nbytes in tensors:
        out += _gguf_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        out += struct.pack("<IQ", kind, at)
        at += nbytes + -nbytes % 32
    return out + bytes(-len(out) % 32) + bytes(at)


_GGUF_NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


# ---------------------------------------------------------------------------------------- readers


def read_shard(files: Files) -> str:
    """One safetensors file: its header's length, the header, and the bytes of each tensor."""
    data = files["model.safetensors"]
    length = safetensors.header_length(data[:8], len(data), "w")
    _, tensors, total = safetensors.parse_header(data[8 : 8 + length], "model.safetensors", "w")
    assert total == sum(t.nbytes for t in tensors.values())
    assert all(t.offset >= 8 + length for t in tensors.values())
    return f"{len(tensors)} tensors"


def read_declared(files: Files) -> str:
    """The quantization sections of both configurations, and what they say of a few modules."""
    config = safetensors.parse_json(files.get("config.json", b"{}"), "config.json")
    nested = None
    if "hf_quant_config.json" in files:
        nested = safetensors.parse_json(files["hf_quant_config.json"], "hf_quant_config.json")
    declaration = read_declaration(config, nested)
    for module in ("lm_head", "model.layers.0.mlp.gate_proj", "mtp.fc", "a" * 200):
        declared = declaration.of(module)
        assert declared is None or str(declared) == declared.spelling
    return f"layout {declaration.layout}, {len(declaration.disagreements)} disagreements"


# Rules that start a process of their own for each input are fuzzed by themselves.
_IN_PROCESS = tuple(rule for rule in select_rules() if "jinja2" not in rule.needs)


def read_folder(files: Files) -> str:
    """A whole folder, as `nybble check` reads it. Returns the ids of rules that fired."""
    report = run_rules(Survey(MemoryFiles(files)), _IN_PROCESS)
    for found in report.findings:
        # Messages are printed: no file may fill the screen, or send the terminal its commands.
        assert 0 < len(found.message) < 20_000, found.rule.id
        assert found.message.isprintable(), found.rule.id
    return " ".join(sorted({found.rule.id for found in report.findings}))


def read_gguf(files: Files) -> str:
    """A GGUF file's fields and tensors, and the values of each."""
    from nybble.checkpoint.gguf import GGUFFile

    path = _folder() / "model.gguf"
    path.write_bytes(files["model.gguf"])
    with GGUFFile.open(path) as opened:
        for tensor in opened.tensors.values():
            assert tensor.offset + tensor.nbytes <= len(files["model.gguf"])
        decoded = sum(opened.values(name).size for name in opened.tensors)
    return f"{len(opened.tensors)} tensors, {decoded > 0}"


def read_checkpoint(files: Files) -> str:
    """A folder as everything but `check` opens it, and every tensor in it."""
    folder = _folder() / "checkpoint"
    _unpack(files, folder)
    with Checkpoint.open(folder) as checkpoint:
        total = sum(checkpoint.array(name).nbytes for name in checkpoint.tensors)
        assert total <= sum(map(len, files.values()))
    return f"{len(checkpoint.tensors)} tensors in {len(checkpoint.shards)}"


def read_as_gguf(files: Files) -> str:
    """A folder as `nybble convert --to gguf` takes it, up to the proof."""
    from nybble.rewrite.to_gguf import write_gguf

    folder, out = _folder() / "checkpoint", _folder() / "out.gguf"
    out.unlink(missing_ok=True)
    _unpack(files, folder)
    with Checkpoint.open(folder) as checkpoint:
        made = write_gguf(checkpoint, out)
    assert out.stat().st_size == made.nbytes
    return f"{sorted(made.types)}"


def _unpack(files: Files, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@cache
def _folder() -> Path:
    """A folder of this process, in memory where there is such a place."""
    memory = Path("/dev/shm")
    made = tempfile.mkdtemp(prefix="hostile-", dir=memory if memory.is_dir() else None)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


@dataclass(frozen=True)
class Reader:
    """A reader, what it begins with, and how many of a thousand inputs are its own."""

    name: str
    read: Callable[[Files], str]
    seeds: Callable[[], list[Files]]
    share: int


def _checkpoint_seeds() -> list[Files]:
    shards = _small_shards()
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {"a": names[0], "w": names[1], "w_scale": names[1], "empty": names[1]}
    index = {"metadata": {"total_size": 22}, "weight_map": weight_map}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    indexed = {
        names[0]: shards[1],
        names[1]: shards[2],
        "config.json": json.dumps(config).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
    }
    return [indexed, {"model.safetensors": shards[2], "config.json": indexed["config.json"]}]


def _declared_seeds() -> list[Files]:
    out = []
    for path in sorted(PUBLISHED.rglob("config.json")):
        small = {"config.json": path.read_bytes()}
        nested = path.with_name("hf_quant_config.json")
        if nested.exists():
            small["hf_quant_config.json"] = nested.read_bytes()
        if sum(map(len, small.values())) < 64_000:
            out.append(small)
    for name in ("nybble-ct", "nybble-modelopt", "nybble-w4a4"):
        files = base(name)
        names = [n for n in ("config.json", "hf_quant_config.json") if n in files]
        out.append({n: files[n] for n in names})
    return out


def _folder_seeds() -> list[Files]:
    whole = [base(name) for name in ("nybble-modelopt", "nybble-w4a4", "nybble-ct", "source-dense")]
    return [*whole, *map(headers_only, whole)]


def _gguf_seeds() -> list[Files]:
    return [base(name) for name in ("nybble-dense", "nybble-modelopt", "nybble-ct")]


READERS = (
    Reader("shard", read_shard, lambda: [{"model.safetensors": s} for s in _small_shards()], 400),
    Reader("gguf", read_gguf, lambda: [{"model.gguf": small_gguf()}], 280),
    Reader("declared", read_declared, _declared_seeds, 200),
    Reader("checkpoint", read_checkpoint, _checkpoint_seeds, 100),
    Reader("folder", read_folder, _folder_seeds, 20),
    Reader("to_gguf", read_as_gguf, _gguf_seeds, 20),
)


# -------------------------------------------------------------------------------------- mutations

NUMBERS = (
    *(0, 1, -1, 2, 7, 8, 15, 16, 17, 31, 32, 64, 127, 128, 255, 256, 4096, 65535, 65536),
    *(2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, -(2**63)),
    *(2**64 - 1, 2**64, 10**30, 10**200, 0.5, -0.0, 1e308, 1e-320),
)
TEXTS = (
    *("", " ", "a", "\x00", "\n", "é", "\ud800", "\u202e", "..", "../x.safetensors", "/etc/passwd"),
    *("*", "**", "[", "re:", "re:(", "re:(a+)+$", "re:.*", "re:^mtp.*", "Linear", "lm_head", "#"),
    *("F32", "BF16", "F4", "U8", "F8_E4M3", "NVFP4", "FP8", "MIXED_PRECISION", "W4A16_NVFP4"),
    *("modelopt", "compressed-tensors", "fp8", "qwen3_5_moe", "llama", "__metadata__", "x" * 2000),
    *(
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.99999999999999999999.x.weight",
        "9" * 50,
    ),
)
KEYS = (
    *("dtype", "shape", "data_offsets", "__metadata__", "weight_map", "metadata", "total_size"),
    *("quantization_config", "quant_method", "quant_algo", "quantized_layers", "ignore"),
    *("config_groups", "targets", "weights", "input_activations", "group_size", "num_bits"),
    *("text_config", "vision_config", "model_type", "num_hidden_layers", "layer_types", "depth"),
    *("num_experts", "vocab_size", "mtp_num_hidden_layers", "kv_cache_scheme", "auto_map"),
    *("hidden_size", "head_dim", "eos_token_id", "added_tokens", "model", "vocab", "torch_dtype"),
)


def mutate(rng: random.Random, files: Files) -> Files:
    """A copy with one file, sometimes two, changed, lost, exchanged or renamed."""
    out = dict(files)
    for _ in range(rng.choice((1, 1, 1, 2))):
        name = _pick(rng, out)
        roll = rng.random()
        if len(out) > 1 and roll < 0.02:
            del out[name]
        elif len(out) > 1 and roll < 0.04:
            out[name] = out[rng.choice(sorted(out))]
        elif len(out) > 1 and roll < 0.05:
            out[rng.choice(("x.json", "y.safetensors", "a/b.safetensors", "z.bin"))] = out[name]
        else:
            out[name] = mutate_file(rng, name, out[name])[:MAX_BYTES]
    return out


def _pick(rng: random.Random, files: Files) -> str:
    names = sorted(files)
    telling = [n for n in names if n in ("config.json", "hf_quant_config.json") or "safeten" in n]
    return rng.choice(telling if telling and rng.random() < 0.8 else names)


def mutate_file(rng: random.Random, name: str, data: bytes) -> bytes:
    """A file changed within its structure, mostly; else its bytes."""
    if rng.random() < 0.15:
        return mutate_bytes(rng, data)
    if name.endswith(".json"):
        return mutate_json(rng, data)
    if name.endswith(".safetensors"):
        return mutate_shard(rng, data)
    if name.endswith(".gguf"):
        return mutate_gguf(rng, data)
    return mutate_bytes(rng, data)


def mutate_shard(rng: random.Random, data: bytes) -> bytes:
    """The header, the length that stands before it, or the data behind it."""
    length = min(int.from_bytes(data[:8], "little"), len(data))
    header, rest = data[8 : 8 + length], data[8 + length :]
    roll = rng.random()
    if roll < 0.1:
        return rng.choice(NUMBERS[:30]).to_bytes(17, "little", signed=True)[:8] + header + rest
    if roll < 0.2:
        rest = mutate_bytes(rng, rest)
    elif roll < 0.25:
        rest = rest[: rng.randrange(len(rest) + 1)]
    elif roll < 0.45:
        header = mutate_dtypes(rng, header)
    else:
        header = mutate_json(rng, header)
        header += b" " * rng.choice((0, 0, 0, 1, 7))
    return len(header).to_bytes(8, "little") + header + rest


#: Dtypes by width: what lies in a file can be called any of its width, and all sizes agree.
_ALIKE = (
    ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"),
    ("I16", "U16", "F16", "BF16"),
    ("I32", "U32", "F32"),
    ("I64", "U64", "F64", "C64"),
)


def mutate_dtypes(rng: random.Random, header: bytes) -> bytes:
    """Another dtype of the same width for one tensor, or for all whose names end alike."""
    try:
        document = json.loads(header)
        names = [n for n, entry in document.items() if "dtype" in entry]
        picked = rng.choice(names)
        old = document[picked]["dtype"]
        new = rng.choice(next(group for group in _ALIKE if old in group))
    except (ValueError, RecursionError, TypeError, AttributeError, IndexError, StopIteration):
        return mutate_json(rng, header)
    leaf = picked.rpartition(".")[2]
    for name in names if rng.random() < 0.6 else [picked]:
        if name.rpartition(".")[2] == leaf and document[name]["dtype"] == old:
            document[name]["dtype"] = new
    return json.dumps(document).encode("utf-8", "surrogatepass")


def mutate_gguf(rng: random.Random, data: bytes) -> bytes:
    """A count, length, type or offset exchanged, wherever one seems to stand; else bytes."""
    if rng.random() < 0.5 or len(data) < 32:
        return mutate_bytes(rng, data)
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        # 32- and 64-bit numbers of a sound file are small: zeros follow a byte that is none.
        places = [i for i in range(4, len(out) - 8) if out[i] and not any(out[i + 1 : i + 4])]
        at = rng.choice(places or [8])
        width = 8 if not any(out[at + 4 : at + 8]) and rng.random() < 0.8 else 4
        old = int.from_bytes(out[at : at + width], "little")
        new = rng.choice((*(n for n in NUMBERS if type(n) is int), old + 1, old - 1, old * 2, 40))
        out[at : at + width] = (new & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    return bytes(out)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bits flipped, bytes and numbers set, pieces lost, doubled or brought in."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(out) + 1)
        end = min(at + rng.choice((1, 2, 4, 8, 64, 1024)), len(out))
        kind = rng.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice(NUMBERS[:30]) & ((1 << 8 * width) - 1)
            out[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
        elif kind == 2:
            del out[at:end]
        elif kind == 3:
            out[at:at] = out[at:end] * rng.choice((1, 1, 2, 50))
        elif kind == 4:
            out[at:at] = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
        else:
            out[at:at] = rng.choice((b"[", b"{", b'"', b",", b"\\", b'{"":', b"\xff")) * rng.choice(
                (1, 2, 5000)
            )
    return bytes(out)


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """A JSON document with a few values or keys exchanged; its bytes if it is none."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(rng, data)
    try:
        for _ in range(rng.choice((1, 1, 2, 3))):
            document = _mutate_value(rng, document)
        text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    except (ValueError, RecursionError):
        return data
    if rng.random() < 0.05:  # a key twice
        text = re.sub(r"\{", '{"dtype": 1, "dtype": 2, ', text, count=1)
    if rng.random() < 0.02:
        text = text.replace("1", rng.choice(("NaN", "-Infinity", "1e999", "9" * 5000)), 1)
    return text.encode("utf-8", "surrogatepass")


def _mutate_value(rng: random.Random, document: Any) -> Any:
    places = list(_places(rng, document))
    if not places:
        return _value(rng, document)
    container, key = rng.choice(places)
    roll = rng.random()
    if roll < 0.45:
        container[key] = _value(rng, container[key])
    elif roll < 0.55:
        del container[key]
    elif roll < 0.65:
        other, inner = rng.choice(places)
        container[key] = json.loads(json.dumps(other[inner]))
    elif roll < 0.75:
        for _ in range(rng.choice((1, 3, 200, 900))):
            container[key] = rng.choice(([container[key]], {"a": container[key]}))
    elif isinstance(container, dict):
        name = rng.choice((*KEYS, *TEXTS, *map(str, container)))
        container[name] = container.pop(key) if roll < 0.9 else _value(rng, container[key])
    else:
        container[key:key] = [container[key]] * rng.choice((1, 2, 40))
    return document


def _places(rng: random.Random, document: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) pairs: all of a small document, some of a large one."""
    rest = [document]
    while rest:
        value = rest.pop()
        keys: list[Any] = []
        if isinstance(value, dict):
            keys = list(value)
        elif isinstance(value, list):
            keys = list(range(len(value)))
        if len(keys) > 24:
            keys = rng.sample(keys, 24)
        for key in keys:
            yield value, key
            if isinstance(value[key], (dict, list)):
                rest.append(value[key])


def _value(rng: random.Random, old: Any) -> Any:
    roll = rng.random()
    if isinstance(old, int) and roll < 0.3:
        return old + rng.choice((-1, 1, 8, -8, old, 1 << 40))
    if isinstance(old, str) and roll < 0.3:
        return rng.choice((old.upper(), old[:-1], old + ".", old * 2, old.replace(".", "..")))
    pool: tuple[Any, ...] = (
        *(None, True, False, [], {}, [[]], {"": {}}, [None], [0], [0, 0], [[1]], {"a": 1}),
        *(rng.choice(NUMBERS), rng.choice(TEXTS)) * 5,
        [rng.choice(NUMBERS) for _ in range(rng.choice((1, 2, 3, 40)))],
        {rng.choice(KEYS): rng.choice(TEXTS)},
    )
    return rng.choice(pool)


# ----------------------------------------------------------------------------------------- watching


class TooSlow(BaseException):
    """An input took longer than TIME_LIMIT_S of processor time."""


@dataclass
class Find:
    """An input that ended otherwise than it may."""

    reader: str
    files: Files = field(repr=False)
    error: str
    place: str
    trace: str = field(repr=False, default="")

    @property
    def signature(self) -> str:
        return f"{self.reader}: {self.error.split(':')[0]} at {self.place}"


@contextmanager
def watched() -> Iterator[None]:
    """Processor time and memory bounded, as far as this process can bound its own."""

    def too_slow(number: int, frame: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, too_slow)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_LIMIT, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def try_input(reader: Reader, files: Files) -> tuple[str, Find | None]:
    """What became of an input, in a few words, and the find if it is one. Within `watched`."""
    signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT_S)
    try:
        return f"ok: {reader.read(files)}", None
    except NybbleError as error:
        if len(str(error)) > 20_000 or not str(error).isprintable():
            return "find", _find(reader, files, error)
        return _words(error), None
    except TooSlow as error:
        return "slow", _find(reader, files, error)
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return "find", _find(reader, files, error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _words(error: NybbleError) -> str:
    """The kind of a message: without names, numbers and quotations."""
    text = str(error).replace(str(_folder()), "")[:200]
    text = re.sub(r"'[^']*'|\"[^\"]*\"|\d+|\[[^\]]*\]", "#", text)
    return f"{type(error).__name__}: {text[:80]}"


def _find(reader: Reader, files: Files, error: BaseException) -> Find:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "nybble" in f.filename and "tests" not in f.filename] or frames
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}"
    trace = "".join(traceback.format_exception(error)[-12:])[-4000:]
    return Find(reader.name, files, f"{type(error).__name__}: {str(error)[:200]}", place, trace)


@dataclass
class Tally:
    """Counts of a run."""

    inputs: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)
    finds: dict[str, Find] = field(default_factory=dict)
    slowest_s: float = 0.0
    peak_bytes: int = 0

    @property
    def total(self) -> int:
        return sum(self.inputs.values())

    def add(self, other: Tally) -> None:
        for mine, theirs in ((self.inputs, other.inputs), (self.outcomes, other.outcomes)):
            for key, count in theirs.items():
                mine[key] = mine.get(key, 0) + count
        self.finds |= other.finds
        self.slowest_s = max(self.slowest_s, other.slowest_s)
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)


def run(inputs: int, seed: str, only: str = "", beat: Callable[[int], None] | None = None) -> Tally:
    """Try so many inputs; the same seed tries the same ones.

    An input whose outcome is new joins those that are mutated further: a message that nobody got
    before is a branch that nobody took before.
    """
    rng = random.Random(seed)
    readers = [r for r in READERS if not only or r.name == only]
    corpus = {r.name: list(r.seeds()) for r in readers}
    seen: dict[str, set[str]] = {r.name: set() for r in readers}
    # A large input costs time in every one of its descendants, and seldom reaches more.
    largest = {name: max(map(_size, files)) + (1 << 14) for name, files in corpus.items()}
    tally = Tally()
    with watched():
        for i in range(inputs):
            if beat and i % 256 == 0:
                beat(i)
            (reader,) = rng.choices(readers, [r.share for r in readers])
            files = mutate(rng, rng.choice(corpus[reader.name]))
            start = time.process_time()
            outcome, find = try_input(reader, files)
            tally.slowest_s = max(tally.slowest_s, time.process_time() - start)
            tally.inputs[reader.name] = tally.inputs.get(reader.name, 0) + 1
            key = f"{reader.name}: {outcome}"
            tally.outcomes[key] = tally.outcomes.get(key, 0) + 1
            if find:
                tally.finds.setdefault(find.signature, find)
            elif outcome not in seen[reader.name] and len(corpus[reader.name]) < 500:
                seen[reader.name].add(outcome)
                if _size(files) <= largest[reader.name]:
                    corpus[reader.name].append(files)
    tally.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return tally


def _size(files: Files) -> int:
    return sum(map(len, files.values()))


# ----------------------------------------------------------------------------------------- fixtures


def save(find: Find, name: str, of: Mapping[str, Files]) -> Path:
    """Write a find as a fixture: the folder of zoo/clean it is nearest to, and what differs."""
    nearest = min(of, key=lambda n: sum(find.files.get(k) != v for k, v in of[n].items()))
    origin = of[nearest] if find.reader == "folder" else {}
    document = {
        "reader": find.reader,
        "error": find.signature,
        "base": nearest if origin else "",
        "removed": sorted(origin.keys() - find.files.keys()),
        "files": {
            k: base64.b64encode(v).decode() for k, v in find.files.items() if origin.get(k) != v
        },
    }
    FIXTURES.mkdir(parents=True, exist_ok=True)
    path = FIXTURES / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def load(path: Path) -> tuple[Reader, Files]:
    """A fixture: the reader and the files it was found with."""
    document = json.loads(path.read_text("utf-8"))
    files = base(document["base"]) if document["base"] else {}
    for name in document["removed"]:
        del files[name]
    files |= {name: base64.b64decode(text) for name, text in document["files"].items()}
    return next(r for r in READERS if r.name == document["reader"]), files
