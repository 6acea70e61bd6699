"""A conversation becomes the text that transformers makes of it, and a template can do no harm."""

from __future__ import annotations

import builtins
import copy
import json
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nybble.errors import MissingExtra, TextError
from nybble.text import chat
from nybble.text.chat import ChatTemplate
from nybble.text.tokenizer import Tokenizer

jinja2 = pytest.importorskip("jinja2")
from nybble.text import sandbox  # noqa: E402  # it needs jinja2

CHAT = Path(__file__).parents[2] / "models" / "hybrid-chat-mtp"

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it's like <outside> & when; « ça va »",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
USER = {"role": "user", "content": "Is it raining in Zürich?\n"}
CALL = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "I should look.",
    "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}},
        {"function": {"name": "weather", "arguments": {"days": [1, 2], "unit": None, "é": True}}},
    ],
}
ANSWER = {"role": "tool", "content": "yes, 4.5 °C"}
THOUGHT = {"role": "assistant", "content": "<think>\nA hat.\n</think>\n\nYes. Take a hat."}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "turns": [USER, THOUGHT, {"role": "user", "content": "And tomorrow?"}, THOUGHT],
    "tools": [{"role": "system", "content": "Be brief."}, USER, CALL, ANSWER, ANSWER, THOUGHT],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}],
    "nothing": [{"role": "user", "content": None}],
}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"enable_thinking": True},
    {"enable_thinking": False},
    {"preserve_thinking": True},
    {"add_generation_prompt": False},
    {"tools": [WEATHER, WEATHER]},
    {"tools": []},
]


def folder_with(folder: Path, template: str, config: Mapping[str, object] | None = None) -> Path:
    (folder / "chat_template.jinja").write_bytes(template.encode())
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return folder


def opened(folder: Path, template: str, config: Mapping[str, object] | None = None) -> ChatTemplate:
    found = ChatTemplate.open(folder_with(folder, template, config))
    assert found is not None
    return found


def rendered(folder: Path, template: str, **variables: object) -> str:
    return opened(folder, template).render([USER], **variables)


def refusal(folder: Path, template: str) -> str:
    """What is said of a template that compiles, or does not, and cannot be rendered."""
    with pytest.raises(TextError) as found:
        rendered(folder, template)
    assert str(folder / "chat_template.jinja") in str(found.value)
    return str(found.value)


def theirs(template: str, messages: list[dict[str, Any]], **settings: Any) -> str:
    """What transformers makes of it; it adds no generation prompt unless asked to."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(CHAT / "tokenizer.json"),
        eos_token="<|im_end|>",
        bos_token="<|endoftext|>",
    )
    settings = {"add_generation_prompt": True, **settings}
    text = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, **settings
    )
    assert isinstance(text, str)
    return text


# ------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_carried_template_renders_as_in_transformers(
    name: str, settings: dict[str, Any]
) -> None:
    template = ChatTemplate.open(CHAT)
    assert template is not None
    messages = CONVERSATIONS[name]
    before = copy.deepcopy(messages)
    text = template.render(messages, **settings)
    assert text == theirs(template.source, messages, **settings)
    assert messages == before


def test_settings_and_tools_change_the_prompt() -> None:
    # Otherwise the test above could compare two renderings that ignore them.
    template = ChatTemplate.open(CHAT)
    assert template is not None
    texts = [template.render(CONVERSATIONS["turns"], **settings) for settings in SETTINGS]
    assert len(set(texts)) == 5  # enable_thinking=False and tools=[] are the default here
    assert '"description": "What it\'s like <outside> & when; « ça va »"' in texts[5]
    assert texts[0].endswith("<|im_start|>assistant\n")


def test_the_prompt_of_a_chat_is_special_tokens_and_text() -> None:
    template = ChatTemplate.open(CHAT)
    assert template is not None
    ids = Tokenizer.open(CHAT).encode(template.render([{"role": "user", "content": "a"}]))
    assert [i for i in ids if i >= 4087] == [4088, 4089, 4088]


PIECES = [
    "{{ bos_token }}|{{ eos_token }}|{{ sep_token }}|{{ documents }}|{{ tools }}|{{ nothing }}",
    "{% for m in messages %}\n  {% if m.content %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\n",
    "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}"
    "{% if i > 4 %}{% break %}{% endif %}{% endfor %}",
    "{% generation %}a{% set x = 1 %}{{ messages[0].content }}{% endgeneration %}{{ x }}",
    '{{ {"b": "é<>&\'", "a": [1, 2.5, none, true]} | tojson }}{{ [1] | tojson(indent=2) }}',
    '{{ {"b": 1, "a": "é"} | tojson(ensure_ascii=true, sort_keys=true, separators=(",", ":")) }}',
    "{% for x in 'abc' %}{{ loop.index }}{{ loop.length }}{{ loop.revindex }}{{ loop.last }}"
    "{{ loop.previtem }}{{ loop.nextitem }}{{ loop.cycle('x', 'y') }}{% else %}none{% endfor %}",
    "{% for x in [] %}a{% else %}none{% endfor %}{% for x in nothing %}a{% endfor %}",
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}"
    "{{ loop.depth }}{% endfor %}",
    "{% for k, v in messages[0] | dictsort if v != 'user' %}{{ k ~ 1 ~ v ~ none }}{% endfor %}",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ f(1) ~ f(3, 4) }}"
    "{% call f(5) %}inner{% endcall %}",
    "{% set ns = namespace(n=1, t='') %}{% for i in range(4) %}{% set ns.n = ns.n * 3 %}"
    "{% set ns.t %}{{ ns.t }}{{ i }}{% endset %}{% endfor %}{{ ns.n }}{{ ns.t }}",
    "{% set x | upper %}a{{ 'b' }}{% endset %}{{ x }}{{ dict(a=1).items() | list }}",
    "{{ 'a-b'.split('-') + ['c'] }}{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ '%05d' % 7 }}{{ 7 % 4 }}",
    "{{ 'x{}y'.format(3) }}{{ 'aXbX'.replace('X', '--') }}{{ 'a'.ljust(4) }}|{{ ' a ' | trim }}",
    "{{ '%s is %d' | format('it', 4) }}{{ [1, 2] | join(', ') }}{{ messages | length }}\r\nb\n",
]


@pytest.mark.parametrize("template", PIECES)
def test_what_templates_are_made_of_renders_as_in_transformers(
    template: str, tmp_path: Path
) -> None:
    config = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}}
    ours = opened(tmp_path, template, config)
    assert ours.render([USER]) == theirs(template, [USER])


def test_strftime_now_is_the_time(tmp_path: Path) -> None:
    before = datetime.now().year
    assert before <= int(rendered(tmp_path, "{{ strftime_now('%Y') }}")) <= datetime.now().year


# -------------------------------------------------------------------------------- where it is found


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert ChatTemplate.open(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": null}')
    assert ChatTemplate.open(tmp_path) is None


@pytest.mark.parametrize(
    "value",
    [
        "config {{ eos_token }}",
        [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": "config {{ eos_token }}"},
        ],
    ],
)
def test_the_config_has_a_template_and_the_file_comes_first(value: object, tmp_path: Path) -> None:
    config = {"chat_template": value, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.open(tmp_path)
    assert template is not None
    assert template.render([USER]) == "config </s>"
    assert template.origin.endswith("tokenizer_config.json: chat_template")
    assert opened(tmp_path, "file {{ eos_token }}", config).render([USER]) == "file </s>"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"chat_template": 3}, "chat_template: expected a string or a list, found a number"),
        ({"chat_template": ["x"]}, "chat_template[0]: expected an object with name and template"),
        ({"chat_template": [{"name": "rag", "template": "x"}]}, '"default", found rag'),
        ({"chat_template": []}, '"default", found an empty list'),
        ({"chat_template": [{"name": "default"}]}, 'the name "default"'),
        ({"chat_template": "x", "eos_token": 2}, "eos_token: expected a string or an object"),
        ({"chat_template": "x" * (chat.MAX_TEMPLATE_BYTES + 1)}, "found 1,000,001"),
    ],
)
def test_a_wrong_config_is_refused(config: object, words: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TextError) as found:
        ChatTemplate.open(tmp_path)
    assert words in str(found.value)
    assert "tokenizer_config.json" in str(found.value)


def test_a_template_file_must_be_short_utf8(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"a\xffb")
    with pytest.raises(TextError, match="is not UTF-8 at byte 1"):
        ChatTemplate.open(tmp_path)
    path.write_bytes(b"x" * (chat.MAX_TEMPLATE_BYTES + 1))
    with pytest.raises(TextError, match="expected at most 1,000,000 bytes"):
        ChatTemplate.open(tmp_path)


# ---------------------------------------------------------------------------------- what is refused


def test_a_template_that_refuses_is_quoted(tmp_path: Path) -> None:
    template = ChatTemplate.open(CHAT)
    assert template is not None
    with pytest.raises(TextError, match="refuses this conversation: Unknown role: judge"):
        template.render([{"role": "judge", "content": "x"}])
    assert "conversation: no" in refusal(tmp_path, "{{ raise_exception('no') }}")


def test_a_failure_names_the_line(tmp_path: Path) -> None:
    assert "line 3: the chat template failed: UndefinedError: 'nothing' is undefined" in refusal(
        tmp_path, "a\nb\n{{ nothing.at.all }}\n"
    )
    assert "line 2: the chat template failed: TemplateSyntaxError" in refusal(
        tmp_path, "a\n{% if %}"
    )
    assert "ZeroDivisionError" in refusal(tmp_path, "{{ 1 / 0 }}")
    assert "no loader" in refusal(tmp_path, "{% include 'x' %}")


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__",
        "''.__class__ is defined",
        "'a' if messages.__class__ else 'b'",
        "messages['__class__']",
        "(messages | attr('__class__')).mro()",
        "messages | map(attribute='__class__') | list",
        "'{0.__class__}'.format(messages)",
        "''.__class__.__mro__[1].__subclasses__()",
        "raise_exception.__globals__",
        "raise_exception.__globals__ is defined",
        "self.__init__.__globals__",
        "cycler.__init__.__globals__.os",
        "lipsum.__globals__",
        "namespace.__init__.__globals__",
        "messages.append({})",
        "messages[0].update(role='x')",
        "messages[0].pop('role')",
    ],
)
def test_a_template_cannot_leave_the_sandbox(expression: str, tmp_path: Path) -> None:
    assert "SecurityError" in refusal(tmp_path, f"{{{{ {expression} }}}}")


def test_a_namespace_takes_no_private_names(tmp_path: Path) -> None:
    assert "SecurityError" in refusal(
        tmp_path, "{% set ns = namespace() %}{% set ns.__class__ = 1 %}"
    )


def test_a_loop_over_a_huge_range_is_refused(tmp_path: Path) -> None:
    assert "Range too big" in refusal(tmp_path, "{% for i in range(10**9) %}{% endfor %}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(900) %}{% for j in range(900) %}{% endfor %}{% endfor %}",
        "{% for i in range(90) %}{% for j in range(90) %}{% for k in range(90) if false %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}",
        "{% for i in range(900) recursive %}{% if loop.depth0 < 3 %}{{ loop(range(900)) }}"
        "{% endif %}{% endfor %}",
    ],
)
def test_work_is_bounded(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 50_000)
    assert "took more than 50,000 steps" in refusal(tmp_path, template)


def test_each_rendering_has_its_own_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = opened(tmp_path, "{% for i in range(90) %}{% endfor %}x")
    monkeypatch.setattr(sandbox, "MAX_STEPS", 91)  # the loop's and the call of range
    for _ in range(3):
        assert template.render([USER]) == "x"
    monkeypatch.setattr(sandbox, "MAX_STEPS", 90)
    with pytest.raises(TextError, match="more than 90 steps"):
        template.render([USER])


DOUBLE = "{% set ns = namespace(s='ab') %}{% for i in range(80) %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(2000) %}{{ i }} {{ messages[0].content }}{% endfor %}",
        "{{ 'a' * 10**12 }}",
        "{{ 10**12 * [1] }}",
        "{{ 'a'.ljust(10**12) }}",
        "{{ 'a'.center(10**12) }}",
        "{{ 5 | center(10**12) }}",
        "{{ 'a' | indent(width=10**12, first=true) }}",
        "{{ '%1000000000d' % 3 }}",
        "{{ '%1000000000d' | format(3) }}",
        "{{ '%*d' % (1000000000, 3) }}",
        "{{ '{:>1000000000}'.format(3) }}",
        "{{ '{:>{}}'.format(3, 10**12) }}",
        "{{ ('a' * 5000).replace('a', 'b' * 5000) }}",
        "{{ ('a' * 5000) | replace('a', 'b' * 5000) }}",
        "{{ 9 ** 9999 }}",
        DOUBLE + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
        DOUBLE + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        DOUBLE + "{% set ns.s = [ns.s] + [ns.s] * 2 %}{% set ns.s = ns.s | join %}{% endfor %}x"
        "{{ ns.s }}",
        DOUBLE + "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
        "{% macro f(s) %}{{ s }}{{ s }}{% endmacro %}"
        + DOUBLE
        + "{% set ns.s = f(ns.s) %}{% endfor %}",
        "{% set ns = namespace(n=3) %}{% for i in range(80) %}{% set ns.n = ns.n * ns.n %}"
        "{% endfor %}{{ ns.n }}",
    ],
)
def test_sizes_are_bounded(template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_LENGTH", 30_000)
    message = refusal(tmp_path, template)
    assert "TemplateRuntimeError" in message
    assert "would" in message or "very wide" in message


def test_an_endless_recursion_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
    assert "RecursionError" in message


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": Path("x")}], "messages[0].content: expected what JSON"),
        ([USER, {"content": [1, {2: 3}]}], "messages[1].content[1]: expected strings as keys"),
        ([{"content": {1, 2}}], "found a builtins.set"),
    ],
)
def test_values_that_are_no_json_are_refused(messages: Any, words: str, tmp_path: Path) -> None:
    template = opened(tmp_path, "x")
    with pytest.raises(TextError) as found:
        template.render(messages)
    assert words in str(found.value)
    with pytest.raises(TextError, match="option: expected what JSON"):
        template.render([USER], option=print)
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(TextError, match="RecursionError"):
        template.render([USER], option=loop)


# -------------------------------------------------------------------------------------- the library


def test_without_jinja2_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> ModuleType:
        if name == "jinja2":
            raise ModuleNotFoundError("No module named 'jinja2'", name=name)
        return found(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "jinja2")
    monkeypatch.setattr(builtins, "__import__", absent)
    assert ChatTemplate.open(tmp_path) is None, "no template, nothing needed"
    with pytest.raises(MissingExtra, match=r"jinja2: pip install 'nybble\[torch\]'"):
        opened(tmp_path, "x")


@pytest.mark.parametrize("version", ["3.1.5", "2.11", "3.1.5.dev1"])
def test_a_jinja2_with_a_leaking_sandbox_is_refused(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jinja2, "__version__", version)
    with pytest.raises(MissingExtra, match=rf"jinja2 3\.1\.6 or later.*found {version}"):
        opened(tmp_path, "x")
    monkeypatch.setattr(jinja2, "__version__", "3.2")
    assert rendered(tmp_path, "x") == "x"
