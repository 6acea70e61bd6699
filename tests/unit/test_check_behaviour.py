"""What goes along with the weights is looked at and never run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from defects import behaviour as planted
from folder import Defect
from make import make
from nybble.check import behaviour, behaviour_tokenizer, templates
from nybble.check.rule import Finding, Severity
from nybble.check.survey import Survey
from nybble.text import isolated
from nybble.text.isolated import Conversation, try_template

ROOT = Path(__file__).parents[2]
CLEAN = ROOT / "zoo" / "clean"
BASE, SOURCE = CLEAN / "nybble-modelopt", CLEAN / "source"
RULES = {rule.id: rule for rule in behaviour.RULES}
USER = {"role": "user", "content": "quartz harbour"}


def findings(path: Path, source: Path | None = None, *, deep: bool = False) -> list[Finding]:
    survey = Survey.open(path, source, deep=deep)
    rules = [r for r in behaviour.RULES if source or "source" not in r.needs]
    return [f for rule in rules if rule.id != "NB590" for f in rule.look(survey)]


def found(path: Path, rule: str, source: Path | None = None, *, deep: bool = False) -> Finding:
    """The one finding of a rule."""
    (finding,) = [f for f in findings(path, source, deep=deep) if f.rule.id == rule]
    return finding


def ids(path: Path, source: Path | None = None) -> list[str]:
    return [f.rule.id for f in findings(path, source)]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A sound checkpoint that a test may change."""
    path = tmp_path / "checkpoint"
    shutil.copytree(BASE, path)
    return path


def edit(path: Path, name: str, change: Callable[[dict[str, object]], object]) -> None:
    file = path / name
    document = json.loads(file.read_text("utf-8"))
    change(document)
    file.write_text(json.dumps(document), "utf-8")


@pytest.mark.parametrize("name", ["source", "nybble-modelopt", "nybble-ct", "nybble-dense"])
def test_sound_checkpoints_have_no_finding(name: str) -> None:
    assert ids(CLEAN / name) == []
    assert ids(CLEAN / name, CLEAN / ("source-dense" if "dense" in name else "source")) == []


SLOW = ("template-endless", "template-doubled")


@pytest.mark.parametrize(
    "defect",
    [pytest.param(d, marks=pytest.mark.slow if d.name in SLOW else ()) for d in planted.DEFECTS],
    ids=lambda d: d.name,
)
def test_a_planted_defect_is_found_and_nothing_else_is_wrong(
    defect: Defect, tmp_path: Path
) -> None:
    path = make(defect, tmp_path / defect.name)
    source = CLEAN / defect.source if defect.source else None
    survey = Survey.open(path, source)
    rules = [r for r in behaviour.RULES if source or "source" not in r.needs]
    all_found = [f for rule in rules for f in rule.look(survey)]
    assert defect.rule in [f.rule.id for f in all_found]
    assert all(
        f.rule.id in (defect.rule, *defect.also) for f in all_found if f.severity > Severity.NOTE
    )


def test_ids_are_unique_and_texts_are_there() -> None:
    assert len(RULES) == len(behaviour.RULES)
    for rule in behaviour.RULES:
        assert rule.id.startswith("NB5")
        assert rule.explanation.endswith(".")
        assert all(thread.startswith("https://") for thread in rule.threads)


# ---------------------------------------------------------------- code


def test_hooks_are_found_in_subfolders_and_lists(copy: Path) -> None:
    inner = copy / "processor" / "config.json"
    inner.parent.mkdir()
    inner.write_text(json.dumps({"steps": [{"auto_map": {"AutoProcessor": "a--b.C"}}, "run.py"]}))
    hooks = found(copy, "NB501")
    assert len(hooks.subjects) == 2
    assert all(h.startswith("processor/config.json: steps") for h in hooks.subjects)


def test_empty_hooks_and_known_attention_are_no_hooks(copy: Path) -> None:
    edit(copy, "config.json", lambda d: d.update(auto_map={}, _attn_implementation="sdpa"))
    edit(copy, "tokenizer_config.json", lambda d: d.update(trust_remote_code=False))
    assert ids(copy) == []


@pytest.mark.parametrize(
    ("name", "data", "is_found"),
    [
        ("training_args.bin", b"\x80\x02}q\x00.", True),
        ("scheduler.pt", b"PK\x03\x04", True),
        ("state.pkl", b"anything", True),
        ("openvino.bin", b"\x00\x00\x80\x3f", False),
        ("pytorch_model-00001-of-00002.bin", b"\x80\x02", False),
        ("empty.bin", b"", False),
    ],
)
def test_side_files_that_unpickle_are_found(
    name: str, data: bytes, is_found: bool, copy: Path
) -> None:
    (copy / name).write_bytes(data)
    assert ("NB503" in ids(copy)) is is_found


# ---------------------------------------------------------------- tokenizer


def test_spelling_of_a_tokenizer_does_not_count(copy: Path) -> None:
    def respell(document: dict[str, object]) -> None:
        document["truncation"] = {"max_length": 512}
        model = document["model"]
        assert isinstance(model, dict)
        model["ignore_merges"] = False
        model["merges"] = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]

    edit(copy, "tokenizer.json", respell)
    assert (copy / "tokenizer.json").read_bytes() != (SOURCE / "tokenizer.json").read_bytes()
    assert ids(copy, SOURCE) == []


def test_a_lost_tokenizer_that_the_source_lacks_too_is_a_note(copy: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    for path in (copy, source):
        (path / "tokenizer.json").unlink()
    assert found(copy, "NB504", source).severity == Severity.NOTE
    assert found(copy, "NB504").severity == Severity.WARNING


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "expected a JSON object"),
        ("{}", 'no object "model"'),
        ('{"model": {"vocab": {}}}', 'no "vocab"'),
        ('{"model": 3', "not valid JSON"),
    ],
)
def test_a_tokenizer_that_is_none_is_named(text: str, words: str, copy: Path) -> None:
    (copy / "tokenizer.json").write_text(text)
    finding = found(copy, "NB519")
    assert finding.severity == Severity.ERROR
    assert words in finding.message


def test_of_a_large_tokenizer_both_ends_are_read(copy: Path) -> None:
    file = copy / "tokenizer.json"
    document = json.loads(file.read_text("utf-8"))
    document["added_tokens"].append({"id": 9999, "content": "<late>"})
    document["model"]["vocab"] |= {f"piece{i}": 20 for i in range(300_000)}
    text = json.dumps(document)
    assert len(text) > behaviour_tokenizer.WHOLE_BYTES
    file.write_text(text)
    assert "<late>" in found(copy, "NB518").message
    file.write_text(text[:-10])
    assert "do not begin with {" in found(copy, "NB519").message
    # Damage in the middle takes a deep look.
    file.write_text(text[:2_000_000] + '"' + text[2_000_000:])
    assert "NB519" not in ids(copy)
    assert "not valid JSON" in found(copy, "NB519", deep=True).message


def test_ids_beyond_the_vocabulary_are_named(copy: Path) -> None:
    edit(copy, "generation_config.json", lambda d: d.update(eos_token_id=[117, 115, 128]))
    finding = found(copy, "NB518")
    assert finding.severity == Severity.WARNING
    assert "generation_config.json: eos_token_id 128 is no token of 128" in finding.message


def test_an_image_token_elsewhere_is_named(copy: Path) -> None:
    edit(copy, "tokenizer_config.json", lambda d: d.update(image_token="<|video_pad|>"))
    assert "'<|video_pad|>' is 121 in the tokenizer" in found(copy, "NB518").message
    edit(copy, "config.json", lambda d: d.update(language_model_only=True))
    assert "NB518" not in ids(copy)


# ------------------------------------------------------------------------------ sampling, processor


def test_modelopt_switching_sampling_on_is_a_note(copy: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    edit(source, "generation_config.json", lambda d: d.pop("do_sample"))
    finding = found(copy, "NB515", source)
    assert finding.severity == Severity.NOTE
    assert "do_sample None became True" in finding.message


def test_versions_in_generation_config_do_not_count(copy: Path) -> None:
    edit(copy, "generation_config.json", lambda d: d.update(transformers_version="0"))
    assert ids(copy, SOURCE) == []


def test_a_processor_of_transformers_5_counts(copy: Path) -> None:
    (copy / "preprocessor_config.json").rename(copy / "processor_config.json")
    assert ids(copy, SOURCE) == []


# ---------------------------------------------------------------- templates


def with_template(path: Path, text: str) -> Path:
    (path / templates.TEMPLATE).write_text(text)
    return path


def test_what_the_source_does_alike_is_a_note(copy: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    text = planted._PLAIN + "{{ m.content }}" + planted._END + "{#- tool #}"
    with_template(copy, text)
    with_template(source, text + "\r\n")
    assert found(copy, "NB510").severity == Severity.WARNING
    assert found(copy, "NB510", source).severity == Severity.NOTE
    assert "NB507" not in ids(copy, source)


def test_a_template_that_knows_only_parts_is_asked_in_parts(copy: Path) -> None:
    text = (
        "{%- for m in messages -%}{{- m.role -}}{%- for p in m.content -%}"
        "{{- p.text if p.type == 'text' else '<image>' -}}{%- endfor -%}{%- endfor -%}"
    )
    assert ids(with_template(copy, text)) == []


def test_a_refusal_is_quoted_and_milder_than_a_crash(copy: Path) -> None:
    one = "{%- if messages[0].role != 'user' -%}{{ raise_exception('user first') }}{%- endif -%}"
    two = "{%- if messages[0].role != 'user' -%}{{ messages.nothing.more }}{%- endif -%}"
    rest = "{%- for m in messages -%}{{ m.content }}{%- endfor -%}"
    refused = found(with_template(copy, one + rest), "NB509")
    assert refused.severity == Severity.NOTE
    assert 'it says "user first"' in refused.message
    broken = found(with_template(copy, two + rest), "NB509")
    assert broken.severity == Severity.WARNING
    assert "line 1: UndefinedError" in broken.message


def test_what_a_template_says_sends_the_terminal_nothing(copy: Path) -> None:
    text = "{{ raise_exception('\x1b[2Jgone\nNB000 all is well') }}"
    message = found(with_template(copy, text), "NB508").message
    assert message.isprintable()
    assert "\\x1b[2Jgone\\nNB000" in message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff", "not UTF-8 at byte 0"),
        (b"x" * 1_000_001, "1,000,001 bytes; at most 1,000,000 are read"),
    ],
    ids=["bytes", "length"],
)
def test_a_template_that_cannot_be_read_is_an_error(data: bytes, words: str, copy: Path) -> None:
    (copy / templates.TEMPLATE).write_bytes(data)
    finding = found(copy, "NB508")
    assert finding.severity == Severity.ERROR
    assert words in finding.message


def test_the_template_of_tokenizer_config_counts_where_there_is_no_file(copy: Path) -> None:
    (copy / templates.TEMPLATE).unlink()
    assert found(copy, "NB506").severity == Severity.NOTE
    edit(copy, "tokenizer_config.json", lambda d: d.update(chat_template="{{ nothing.x }}"))
    assert "tokenizer_config.json: one user turn" in found(copy, "NB508").message
    edit(copy, "tokenizer_config.json", lambda d: d.update(chat_template=[{"name": "rag"}]))
    assert '"default"' in found(copy, "NB508").message


def test_templates_of_three_files_are_compared(copy: Path) -> None:
    text = (copy / templates.TEMPLATE).read_text()
    edit(copy, "tokenizer_config.json", lambda d: d.update(chat_template=text + "\n"))
    assert ids(copy) == []
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": "another"}))
    assert "chat_template.json" in found(copy, "NB517").message


def test_a_tried_template_meets_its_limits() -> None:
    grow = "{%- set ns = namespace(x=[]) -%}{%- for i in range(9999) -%}"
    grow += "{%- set ns.x = [ns.x, ('x' * 9999999 ~ i)] -%}{%- endfor -%}"
    (rendered, *_) = try_template(grow, {}, [Conversation([USER])])
    assert not rendered.is_text
    assert rendered.failure


def test_after_what_does_not_end_the_rest_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "WALL_LIMIT_S", 1.0)
    rendered = try_template(planted.DOUBLED, {}, [Conversation([USER])] * 3)
    assert len(rendered) == 1
    assert "does not end" in rendered[0].failure


def test_nothing_is_imported_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("jinja2", "json", "nybble"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the folder')")
    monkeypatch.chdir(tmp_path)
    (rendered,) = try_template("{{ messages[0].content }}", {}, [Conversation([USER])])
    assert rendered.text == "quartz harbour"


def test_the_tokens_of_the_configuration_are_given() -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "unused"}
    (rendered,) = try_template("{{ bos_token }}{{ eos_token }}", config, [Conversation([USER])])
    assert rendered.text == "<s></s>"


# ---------------------------------------------------------------------------- nothing is ever run

WATCH = """
import os, sys
from pathlib import Path

folder = os.path.realpath(sys.argv[1])
command = [sys.executable, "-P", "-m", "nybble.text.isolated"]
# What the checks themselves need is imported before anyone looks.
import nybble.check.run as run
from nybble.check.survey import Survey
run.run_rules(Survey.open(Path(sys.argv[2]), Path(sys.argv[2])))
reads = {"listdir", "scandir"}

def hook(event, arguments):
    text = repr(arguments)
    if event in ("import", "exec", "compile", "marshal.loads", "code.__new__") and folder in text:
        os.write(2, f"ran: {event} {text[:300]}".encode())
        os._exit(9)
    if event == "import" and "planted" in str(arguments[0]):
        os.write(2, f"imported: {text[:300]}".encode())
        os._exit(9)
    if event in ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork",
                 "os.spawn", "socket.connect", "socket.getaddrinfo", "ctypes.dlopen"):
        os.write(2, f"called: {event} {text[:300]}".encode())
        os._exit(9)
    if event == "subprocess.Popen" and list(arguments[1]) != command:
        os.write(2, f"started: {text[:300]}".encode())
        os._exit(9)
    if event == "open" and folder in text and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        os.write(2, f"wrote: {text[:300]}".encode())
        os._exit(9)

sys.addaudithook(hook)
report = run.run_rules(Survey.open(Path(folder), Path(sys.argv[2])))
print(" ".join(sorted({f.rule.id for f in report.findings})))
"""

PLANTED = "import os, sys\nopen({mark!r}, 'w').close()\nos._exit(7)\n"


def plant(path: Path, mark: Path) -> None:
    """Every way in which a checkpoint's own code could be run, each leaving a mark if it is."""
    code = PLANTED.format(mark=str(mark))
    names = ("configuration_planted", "modeling_planted", "planted", "tokenization_planted")
    for name in (*names, "jinja2", "json", "numpy", "sitecustomize", "usercustomize", "conftest"):
        (path / f"{name}.py").write_text(code)
    (path / "__init__.py").write_text(code)
    (path / "nybble.pth").write_text(f"import os; open({str(mark)!r}, 'w')\n")
    classes = {"AutoConfig": "configuration_planted.C", "AutoModel": "modeling_planted.M"}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        edit(
            path,
            name,
            lambda d: d.update(
                auto_map=classes,
                custom_pipelines={"planted": {"impl": "planted.P", "pt": ["AutoModel"]}},
                trust_remote_code=True,
                _attn_implementation_internal="somebody/planted",
                quant_module="planted.py",
            ),
        )
    edit(
        path,
        "preprocessor_config.json",
        lambda d: d.update(auto_map={"AutoImageProcessor": "planted.P"}),
    )
    call = f"cos\nsystem\n(S'touch {mark}'\ntR.".encode()
    for name in ("training_args.bin", "pytorch_model.bin", "optimizer.pt", "state.pkl", "x.ckpt"):
        (path / name).write_bytes(call)
    with_template(
        path,
        "{{ messages[0].content }}{% set x = cycler.__init__.__globals__.os.popen('touch "
        + str(mark)
        + "') %}",
    )


def test_nothing_of_a_checkpoint_is_run(copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    plant(copy, mark)
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(copy), str(SOURCE)],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not mark.exists()
    assert {"NB501", "NB502", "NB503", "NB508"} <= set(done.stdout.split())


def test_the_watch_notices_what_is_run(copy: Path, tmp_path: Path) -> None:
    """The test above could not pass if the hook saw nothing."""
    mark = tmp_path / "ran"
    plant(copy, mark)
    for line in ("import planted", "import pickle; pickle.load(open('state.pkl', 'rb'))"):
        script = WATCH.replace("report = ", f"sys.path.insert(0, folder); {line}\nreport = ")
        done = subprocess.run(
            [sys.executable, "-c", script, str(copy), str(SOURCE)],
            cwd=copy,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
        assert done.returncode == 9, done.stderr[-2000:]
