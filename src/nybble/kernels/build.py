"""The shared library of C kernels: found prebuilt, or compiled once for this source and cached.

Order: a library shipped inside the wheel; the cache; the system's compiler (`$CC`, cc, gcc, clang);
`ziglang` from the package registry. Every instruction set is in the one library and chosen at run
time, so it may move between machines of one architecture. Each missing thing is said in one line,
and costs speed, never the result.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from nybble.errors import KernelUnavailable

log = logging.getLogger("nybble")

FOLDER = Path(__file__).parent
SOURCES = tuple(sorted(p.relative_to(FOLDER).as_posix() for p in FOLDER.rglob("*.c")))
# Contraction would round products twice on some machines and once on others; codes must not depend
# on that. GCC's two keep it from spilling the candidates of the scale search (5 % of its speed).
FLAGS = ("-O3", "-std=c11", "-ffp-contract=off", "-fPIC", "-pthread")
# zig compiles for the very machine it runs on unless told otherwise; the instruction sets that
# are used are named at each kernel.
ZIG_FLAGS = ("-mcpu=baseline",)
GCC_FLAGS = ("-fschedule-insns", "-fno-tree-slp-vectorize")


@dataclass(frozen=True, slots=True)
class Library:
    """A loaded kernel library, and how it was come by; or None with the reason."""

    handle: ctypes.CDLL | None
    origin: str


def source_hash() -> str:
    """A hash over every C source and header, the flags and the machine: the cache key."""
    digest = hashlib.sha256()
    for path in sorted([*FOLDER.rglob("*.c"), *FOLDER.rglob("*.h")]):
        digest.update(path.relative_to(FOLDER).as_posix().encode() + b"\0" + path.read_bytes())
    digest.update(repr((FLAGS, GCC_FLAGS, ZIG_FLAGS, platform.machine(), sys.platform)).encode())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where compiled libraries are kept: `$NYBBLE_CACHE`, else the user's cache folder."""
    chosen = os.environ.get("NYBBLE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nybble"


def library_name() -> str:
    """The file name of the library for the present sources."""
    return f"libnybble-{source_hash()}.{'dylib' if sys.platform == 'darwin' else 'so'}"


def compilers() -> list[list[str]]:
    """Command prefixes that may compile C here, best first."""
    found = []
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name.split()[0]):
            found.append(name.split())
    if importlib.util.find_spec("ziglang"):
        found.append([sys.executable, "-m", "ziglang", "cc"])
    return found


def compile_library(compiler: list[str], target: Path) -> None:
    """Compile into target, atomically: concurrent starts each rename a whole file.

    Raises OSError if the folder cannot be written, CalledProcessError if the compiler fails.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as name:
        folder = Path(name)
        out = folder / target.name
        is_zig = "ziglang" in compiler
        environment = dict(os.environ)
        if is_zig:  # zig keeps a cache of its own, by default in the home folder
            environment.setdefault("ZIG_GLOBAL_CACHE_DIR", str(folder / "zig"))
            environment.setdefault("ZIG_LOCAL_CACHE_DIR", str(folder / "zig"))
        extra = ZIG_FLAGS if is_zig else GCC_FLAGS
        for flags in (extra, ()):
            try:
                _compile([*compiler, *FLAGS, *flags], folder, out, environment)
                break
            except subprocess.CalledProcessError:
                if not flags:
                    raise
        out.chmod(0o755)  # a group-writable one, as umask 002 makes it, would not be ours next time
        os.replace(out, target)


def _compile(command: list[str], folder: Path, out: Path, environment: dict[str, str]) -> None:
    """Compile the sources, several at a time, and link them."""

    def compile_one(source: str) -> str:
        made = str(folder / f"{source.replace('/', '-')}.o")
        _run([*command, "-c", str(FOLDER / source), "-o", made], environment)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    _run([*command, "-shared", *objects, "-o", str(out), "-lm"], environment)


def _run(command: list[str], environment: dict[str, str]) -> None:
    subprocess.run(command, capture_output=True, text=True, env=environment, check=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time compiles into a folder; the others wait for what it makes."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def build(force: bool = False) -> tuple[Path | None, str]:
    """Find or make the library. Returns its path, or None, and one line saying which and why."""
    name = library_name()
    if (FOLDER / name).exists() and not force:
        return FOLDER / name, "prebuilt, shipped with the package"
    cached = cache_folder() / name
    spare = Path(tempfile.gettempdir()) / f"nybble-{os.getuid()}" / name
    if _is_ours(cached) and not force:
        return cached, f"compiled earlier: {cached}"
    if _is_ours(spare.parent) and _is_ours(spare) and not force:
        return spare, f"compiled earlier: {spare}"
    available = compilers()
    if not available:
        return None, "no C compiler (cc, gcc, clang, or `pip install ziglang`): numpy does the work"
    problems = []
    for compiler in available:
        shown = "ziglang" if "ziglang" in compiler else " ".join(compiler)
        for target in (cached, spare):
            try:
                if target is spare:
                    _make_private(spare.parent)
                with _alone(target.parent):
                    if force or not _is_ours(target):  # another process may just have made it
                        compile_library(compiler, target)
            except OSError as error:
                problems.append(f"cannot write {target.parent}: {error.strerror}")
                continue
            except subprocess.CalledProcessError as error:
                lines = (error.stderr or "").strip().splitlines()
                problems.append(f"{shown} failed: {lines[-1] if lines else error}")
                break
            note = f" ({'; '.join(problems)})" if problems else ""
            return target, f"compiled with {shown} into {target}{note}"
    return None, "; ".join(problems) + ": numpy does the work"


def _make_private(folder: Path) -> None:
    """Make a folder that only this user may write; OSError if somebody else's is in its place."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _is_ours(folder):
        raise OSError(errno.EPERM, "others may write there")


def _is_ours(path: Path) -> bool:
    """It is there, and only this user or root can have written it: a library is code."""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid in (os.getuid(), 0) and not found.st_mode & 0o022


@lru_cache(maxsize=1)
def load() -> Library:
    """The library, built on first use; without one, `handle` is None and `origin` says why."""
    path, origin = build()
    if path is None:
        log.warning("compiled kernels are not available: %s", origin)
        return Library(None, origin)
    try:
        return Library(ctypes.CDLL(str(path)), origin)
    except OSError as error:
        log.warning("%s could not be loaded (%s): compiled anew", path, error)
    path, origin = build(force=True)  # a file cut short by a crash would else stay for good
    try:
        return Library(ctypes.CDLL(str(path)) if path else None, origin)
    except OSError as error:
        log.warning("compiled kernels could not be loaded from %s: %s", path, error)
        return Library(None, f"{path} could not be loaded: {error}")


def loaded() -> ctypes.CDLL:
    """The library for a caller that cannot do without. Raises KernelUnavailable with the reason."""
    library = load()
    if library.handle is None:  # dispatch never gets here; a direct caller may
        raise KernelUnavailable(library.origin)
    return library.handle
