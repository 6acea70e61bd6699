"""Where the compiled library comes from, and that what is missing costs speed and one line."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import stat
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from nybble.errors import KernelUnavailable
from nybble.formats.block import NVFP4
from nybble.formats.search import quantize as definition
from nybble.kernels import block_quantize, build, dispatch

SOURCE = Path(build.__file__).parents[2]
HAS_COMPILER = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no cc, gcc or clang")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache, a temporary folder of its own, and no choice remembered before or after."""
    for name in ("NYBBLE_KERNELS", "NYBBLE_ISA", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path / "tmp"))
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lives as long as a process is found anew; the real library comes back after the test."""
    load = lru_cache(build.load.__wrapped__)
    for module in (build, dispatch):
        monkeypatch.setattr(module, "load", load)
    monkeypatch.setattr(dispatch, "_choose", lru_cache(dispatch._choose.__wrapped__))


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A `cc` that takes a moment less: it writes an empty library, or fails if FAIL is set."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "cc"
    script.write_text(
        "#!/bin/sh\n"
        '[ -z "$FAIL" ] || { echo "first line" >&2; echo "error: $FAIL" >&2; exit 1; }\n'
        'while [ "$1" != -o ]; do shift; done\n'
        'echo library > "$2"\n'
    )
    script.chmod(0o755)
    return folder


def only(folder: Path, monkeypatch: pytest.MonkeyPatch, ziglang: bool = False) -> None:
    """PATH is one folder and /bin, without its compilers; ziglang is there or not."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("sh", "echo"):
        (tools / name).symlink_to(shutil.which(name) or f"/bin/{name}")
    monkeypatch.setenv("PATH", f"{folder}:{tools}")
    if not ziglang:
        monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)


# --------------------------------------------------------------------------- compilers


def test_without_a_compiler_numpy_works_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    only(tmp_path / "empty", monkeypatch)
    with caplog.at_level(logging.WARNING, "nybble"):
        assert dispatch.choose().backend == "reference"
        x = np.linspace(-1, 1, 64, dtype=np.float32)
        codes, scales = np.empty(32, np.uint8), np.empty(4, np.uint8)
        block_quantize.quantize([x], NVFP4, "mse", np.ones(1, "f4"), [codes], [scales])
    wanted = definition(x[None], NVFP4, "mse", scale=np.float32(1))
    assert codes.tobytes() == wanted.codes.tobytes()
    [record] = caplog.records
    said = record.getMessage()
    assert "\n" not in said
    for part in ("no C compiler", "cc, gcc, clang", "pip install ziglang", "numpy does the work"):
        assert part in said
    assert dispatch.machine_isas() == []


def test_asking_for_compiled_kernels_without_a_compiler_raises_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    only(tmp_path / "empty", monkeypatch)
    for name, value in (("NYBBLE_KERNELS", "cpu"), ("NYBBLE_ISA", "portable")):
        monkeypatch.setenv(name, value)
        with pytest.raises(KernelUnavailable, match="asked for and are not there: no C compiler"):
            dispatch.choose()
        monkeypatch.delenv(name)


def test_a_compiler_that_fails_is_named_with_its_last_line(
    stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(stub, monkeypatch)
    monkeypatch.setenv("FAIL", "cannot find -lm")
    path, said = build.build()
    assert path is None
    assert said == "cc failed: error: cannot find -lm: numpy does the work"


def test_the_next_compiler_is_tried_and_the_first_ones_failure_told(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(stub, monkeypatch)
    (stub / "cc").rename(stub / "gcc")
    (stub / "cc").write_text('#!/bin/sh\necho "cc: broken" >&2\nexit 1\n')
    (stub / "cc").chmod(0o755)
    path, said = build.build()
    assert path == tmp_path / "cache" / build.library_name()
    assert said == f"compiled with gcc into {path} (cc failed: cc: broken)"


def test_cc_of_the_environment_comes_first_with_its_arguments(
    stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{stub}:{os.environ['PATH']}")
    monkeypatch.setenv("CC", "cc -pipe")
    assert build.compilers()[0] == ["cc", "-pipe"]


@pytest.mark.slow
def test_ziglang_compiles_where_there_is_no_cc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ziglang")
    (tmp_path / "empty").mkdir()
    only(tmp_path / "empty", monkeypatch, ziglang=True)
    path, said = build.build()
    assert said == f"compiled with ziglang into {path}"
    library = build.load().handle
    assert library is not None
    x = (np.random.default_rng(0).standard_normal(33 * 16) * 0.02).astype(np.float32)
    wanted = definition(x[None], NVFP4, "mse", scale=np.float32(2.0**-13))
    for isa in dispatch.machine_isas():
        monkeypatch.setenv("NYBBLE_ISA", isa)
        codes, scales = np.empty(x.size // 2, np.uint8), np.empty(33, np.uint8)
        top = np.array([2.0**-13], "f4")
        block_quantize.quantize([x], NVFP4, "mse", top, [codes], [scales])
        np.testing.assert_array_equal(scales, wanted.scale[0])
        np.testing.assert_array_equal(codes, wanted.codes[0])


# ------------------------------------------------------------------------------- cache


def test_the_cache_is_used_again(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(stub, monkeypatch)
    path, said = build.build()
    assert said.startswith("compiled with cc into")
    assert build.build() == (path, f"compiled earlier: {path}")
    assert build.build(force=True)[1].startswith("compiled with cc into")


def test_a_loose_umask_does_not_compile_every_time(
    stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(stub, monkeypatch)
    before = os.umask(0o002)  # the default where every user has a group of their own
    try:
        path, _ = build.build()
        assert path is not None
        assert stat.S_IMODE(path.stat().st_mode) == 0o755
        assert build.build()[1] == f"compiled earlier: {path}"
    finally:
        os.umask(before)


def test_nothing_but_the_library_is_left_in_the_cache(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(stub, monkeypatch)
    build.build()
    monkeypatch.setenv("FAIL", "broken")
    build.build(force=True)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [build.library_name()]


def test_an_unwritable_cache_falls_back_to_a_private_folder_and_says_so(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(stub, monkeypatch)
    (tmp_path / "file").write_text("not a folder")  # root can write into any folder
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "file" / "cache"))
    path, said = build.build()
    assert path is not None
    assert path.parent == tmp_path / "tmp" / f"nybble-{os.getuid()}"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert f"cannot write {tmp_path / 'file' / 'cache'}: Not a directory" in said
    assert build.build() == (path, f"compiled earlier: {path}")


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777])
def test_a_library_that_others_may_write_is_not_loaded(
    stub: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    only(stub, monkeypatch)
    path, _ = build.build()
    assert path is not None
    path.write_text("somebody else's")
    path.chmod(mode)
    again, said = build.build()
    assert again == path
    assert said.startswith("compiled with cc into")
    assert path.read_text() == "library\n"


@pytest.mark.parametrize("mode", [0o770, 0o777])
def test_a_temporary_folder_that_others_may_write_is_not_used(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    only(stub, monkeypatch)
    folder = tmp_path / "tmp" / f"nybble-{os.getuid()}"
    folder.mkdir()
    (folder / build.library_name()).write_text("somebody else's")
    folder.chmod(mode)
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "file" / "cache"))
    path, said = build.build()
    assert path is None
    assert f"cannot write {folder}: others may write there" in said
    assert (folder / build.library_name()).read_text() == "somebody else's"


def test_no_temporary_folder_is_made_where_the_cache_works(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(stub, monkeypatch)
    build.build()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_prebuilt_library_comes_first(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(stub, monkeypatch)
    copy = tmp_path / "kernels"
    shutil.copytree(build.FOLDER, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr(build, "FOLDER", copy)
    (copy / build.library_name()).write_text("prebuilt")
    assert build.build() == (copy / build.library_name(), "prebuilt, shipped with the package")


def test_a_library_that_does_not_load_is_told_and_numpy_works(
    stub: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    only(stub, monkeypatch)  # its library is a line of text
    with caplog.at_level(logging.WARNING, "nybble"):
        assert dispatch.choose().backend == "reference"
    first, second = (record.getMessage() for record in caplog.records)
    assert "could not be loaded" in first
    assert "compiled anew" in first
    assert "could not be loaded from" in second


def test_the_name_changes_with_sources_and_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(build.FOLDER, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    before = build.library_name()
    monkeypatch.setattr(build, "FOLDER", copy)
    assert build.library_name() == before  # where the sources lie does not matter
    header = copy / "block_quantize" / "lanes.h"
    header.write_text(header.read_text() + "\n")
    changed = build.library_name()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    assert len({before, changed, build.library_name()}) == 3


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"NYBBLE_CACHE": "/a"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/nybble"),
        ({"HOME": "/c"}, "/c/.cache/nybble"),
    ],
)
def test_cache_folder(
    environment: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NYBBLE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert build.cache_folder() == Path(wanted)


@needs_compiler
def test_the_c_code_compiles_without_warnings(tmp_path: Path) -> None:
    compiler = build.compilers()[0]
    sources = [str(build.FOLDER / s) for s in build.SOURCES]
    flags = [f for f in build.FLAGS if f != "-O3"]  # warnings do not need the time
    command = [
        *compiler,
        *flags,
        "-shared",
        "-O1",
        "-Wall",
        "-Wextra",
        *sources,
        "-o",
        str(tmp_path / "x.so"),
    ]
    result = subprocess.run([*command, "-lm"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@needs_compiler
@pytest.mark.slow
def test_processes_that_start_together_leave_one_good_library(tmp_path: Path) -> None:
    program = (
        "from nybble.kernels import build, dispatch\n"
        "build.load()\n"
        "print(dispatch.choose().backend, dispatch.machine_isas()[-1])\n"
    )
    environment = {**os.environ, "NYBBLE_CACHE": str(tmp_path / "c"), "PYTHONPATH": str(SOURCE)}
    started = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [p.communicate()[0] for p in started] == [b"cpu portable\n"] * 2
    assert [p.name for p in (tmp_path / "c").iterdir()] == [build.library_name()]
    ctypes.CDLL(str(tmp_path / "c" / build.library_name()))


# ---------------------------------------------------------------------------- dispatch


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        ("NYBBLE_KERNELS", "cuda", "choose cpu or reference"),
        ("NYBBLE_ISA", "sse2", "choose portable, avx2, avx512"),
    ],
)
def test_unknown_choices_name_the_known_ones(
    name: str, value: str, choices: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(KernelUnavailable, match=f"{name}={value}: unknown.*{choices}"):
        dispatch.choose()


class OldMachine:
    """Stands for the library on a processor of a given level."""

    def __init__(self, level: int) -> None:
        self.level = level

    def nyb_isa(self) -> int:
        return self.level


def on_machine(level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.Library(OldMachine(level), "a test")  # type: ignore[arg-type]
    monkeypatch.setattr(dispatch, "load", lambda: library)


def test_asking_for_what_the_processor_lacks_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine(dispatch.ISAS["avx2"], monkeypatch)
    monkeypatch.setenv("NYBBLE_ISA", "avx512")
    with pytest.raises(KernelUnavailable, match="this processor offers avx2, portable"):
        dispatch.choose()


@pytest.mark.parametrize("best", dispatch.ISAS)
def test_the_best_instruction_set_is_taken_unless_one_is_asked_for(
    best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_machine(dispatch.ISAS[best], monkeypatch)
    assert dispatch.machine_isas()[0] == best
    assert str(dispatch.choose()) == f"cpu {best}"
    monkeypatch.setenv("NYBBLE_ISA", "portable")
    assert str(dispatch.choose()) == "cpu portable"


def test_the_reference_needs_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> build.Library:
        raise AssertionError("the library was loaded")

    monkeypatch.setattr(dispatch, "load", never)
    monkeypatch.setenv("NYBBLE_KERNELS", "reference")
    choice = dispatch.choose()
    assert (str(choice), choice.origin) == ("reference", "NYBBLE_KERNELS=reference")


def test_the_choice_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_machine(0, monkeypatch)
    with caplog.at_level(logging.INFO, "nybble"):
        for _ in range(3):
            dispatch.choose()
    assert [r.getMessage() for r in caplog.records] == ["kernels: cpu portable (a test)"]


def test_default_threads_are_the_processors_of_this_process() -> None:
    assert dispatch.default_threads() == len(os.sched_getaffinity(0))
