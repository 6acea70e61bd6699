"""What goes along with the weights: code, tokenizer, chat template, sampling, image processor."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from folder import Defect, Folder

BASE, SOURCE = "nybble-modelopt", "source"
TEMPLATE = "chat_template.jinja"
CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
GENERATION = "generation_config.json"
Plant = Callable[[Folder], None]


def with_keys(file: str, **keys: object) -> Plant:
    """Set keys of a JSON file."""

    def plant(folder: Folder) -> None:
        document = folder.document(file)
        assert any(document.get(key) != value for key, value in keys.items())
        folder.put(file, {**document, **keys})

    return plant


def without(*files: str) -> Plant:
    """Leave out files."""

    def plant(folder: Folder) -> None:
        for file in files:
            del folder.files[file]

    return plant


def replaced(old: str, new: str, file: str = TEMPLATE) -> Plant:
    """Replace a text, which must be there."""

    def plant(folder: Folder) -> None:
        text = folder.files[file].decode()
        if old not in text:
            raise ValueError(f"{file} has no {old!r}")
        folder.files[file] = text.replace(old, new).encode()

    return plant


def with_template(text: str) -> Plant:
    """Another chat template."""

    def plant(folder: Folder) -> None:
        folder.files[TEMPLATE] = text.encode()

    return plant


def auto_map(folder: Folder) -> None:
    with_keys(CONFIG, auto_map={"AutoConfig": "configuration_planted.PlantedConfig"})(folder)
    folder.files["configuration_planted.py"] = b'raise SystemExit("the planted code ran")\n'


def custom_pipeline(folder: Folder) -> None:
    pipelines = {"planted": {"impl": "planted.Pipeline", "pt": ["AutoModel"]}}
    with_keys(CONFIG, custom_pipelines=pipelines)(folder)
    folder.files["planted.py"] = b'raise SystemExit("the planted code ran")\n'


def shell_script(folder: Folder) -> None:
    folder.files["install.sh"] = b"#!/bin/sh\nexit 1\n"


class _Planted:
    """Unpickles to a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('the planted pickle ran')",))


def side_pickle(folder: Folder) -> None:
    folder.files["training_args.bin"] = pickle.dumps(_Planted(), protocol=2)


def other_vocabulary(folder: Folder) -> None:
    document = folder.document(TOKENIZER)
    vocabulary = document["model"]["vocab"]
    one, other = sorted(vocabulary, key=lambda token: vocabulary[token])[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    folder.put(TOKENIZER, document)


def token_beyond(folder: Folder) -> None:
    document = folder.document(TOKENIZER)
    size = folder.document(CONFIG)["text_config"]["vocab_size"]
    document["added_tokens"].append({**document["added_tokens"][-1], "id": size, "content": "<x>"})
    folder.put(TOKENIZER, document)


def cut_tokenizer(path: Path) -> None:
    file = path / TOKENIZER
    file.write_bytes(file.read_bytes()[:-100])


def pointer(path: Path) -> None:
    file = path / TOKENIZER
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 19989343\n"
    file.write_text(text)


_PLAIN = "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}"
_END = "{{ '<|im_end|>\\n' }}{%- endfor -%}{{ '<|im_start|>assistant\\n' }}"
NO_USER = "{%- if messages | selectattr('role', 'equalto', 'user') | list | length == 0 -%}"
ESCAPE = "{{ messages[0].content.__class__.__mro__[1].__subclasses__() }}"
ENDLESS = (
    "{%- for a in range(99999) -%}{%- for b in range(99999) -%}{%- for c in range(99999) -%}"
    "{%- endfor -%}{%- endfor -%}{%- endfor -%}{{ messages[0].content }}"
)
DOUBLED = (
    "{%- set ns = namespace(a=[1], b=[1]) -%}{%- for i in range(60) -%}"
    "{%- set ns.a = [ns.a, ns.a] -%}{%- set ns.b = [ns.b, ns.b] -%}{%- endfor -%}"
    "{{ messages[0].content if ns.a == ns.b }}"
)
NO_TOOLS = _PLAIN + "{{ m.content or '' }}" + _END + "{#- tools are not for this one -#}"

DEFECTS = [
    Defect(
        "code-auto-map",
        "NB501",
        BASE,
        "config.json maps its class to a Python file of the folder, which vLLM 0.10 to 0.13 ran.",
        auto_map,
        origin="thread: https://nvd.nist.gov/vuln/detail/CVE-2026-22807",
        repaired=True,
    ),
    Defect(
        "code-custom-pipelines",
        "NB501",
        BASE,
        "config.json names a pipeline of the folder's own.",
        custom_pipeline,
        repaired=True,
    ),
    Defect(
        "code-attention-kernel",
        "NB501",
        BASE,
        "config.json names a repository as attention implementation, which transformers ran.",
        with_keys(CONFIG, _attn_implementation_internal="somebody/kernel"),
        origin="thread: https://nvd.nist.gov/vuln/detail/CVE-2026-4372",
        repaired=True,
    ),
    Defect(
        "code-trust-remote",
        "NB501",
        BASE,
        "tokenizer_config.json switches remote code on.",
        with_keys(TOKENIZER_CONFIG, trust_remote_code=True),
        repaired=True,
    ),
    Defect("code-script", "NB502", BASE, "A shell script among the weights.", shell_script),
    Defect(
        "code-pickle",
        "NB503",
        BASE,
        "training_args.bin runs code if loaded.",
        side_pickle,
        repaired=True,
    ),
    Defect(
        "tokenizer-missing",
        "NB504",
        BASE,
        "Neither tokenizer.json nor its configuration was copied, as an export without the "
        "script around it leaves it.",
        without(TOKENIZER, TOKENIZER_CONFIG),
        origin="tool: nvidia-modelopt 0.47 export_hf_checkpoint writes no tokenizer",
        source=SOURCE,
        repaired=True,
    ),
    Defect(
        "tokenizer-other-vocabulary",
        "NB505",
        BASE,
        "Two tokens have changed places.",
        other_vocabulary,
        source=SOURCE,
        repaired=True,
    ),
    Defect(
        "tokenizer-token-beyond",
        "NB518",
        BASE,
        "An added token has the id vocab_size, for which the embedding has no row.",
        token_beyond,
        repaired=True,
        severity="error",
    ),
    Defect(
        "tokenizer-end-unknown",
        "NB518",
        BASE,
        "generation_config.json does not stop at the token that ends a turn.",
        with_keys(GENERATION, eos_token_id=[115]),
        repaired=True,
    ),
    Defect(
        "tokenizer-image-token",
        "NB518",
        BASE,
        "image_token_id is none of the tokenizer's tokens.",
        with_keys(CONFIG, image_token_id=5000),
    ),
    Defect(
        "tokenizer-cut",
        "NB519",
        BASE,
        "tokenizer.json is cut off.",
        after=cut_tokenizer,
        source=SOURCE,
        repaired=True,
    ),
    Defect(
        "tokenizer-pointer",
        "NB519",
        BASE,
        "tokenizer.json is the pointer of git-lfs.",
        after=pointer,
        source=SOURCE,
        repaired=True,
    ),
    Defect(
        "template-missing",
        "NB506",
        BASE,
        "The chat template was not copied.",
        without(TEMPLATE),
        source=SOURCE,
        repaired=True,
    ),
    Defect(
        "template-changed",
        "NB507",
        BASE,
        "A changed template, as community checkpoints carry them: tools after the messages.",
        replaced("# Tools", "# Functions"),
        origin="thread: https://github.com/QwenLM/Qwen3/issues/1831",
        source=SOURCE,
        repaired=True,
    ),
    Defect(
        "template-syntax",
        "NB508",
        BASE,
        "The template does not compile.",
        replaced("{%- endmacro -%}", "{%- endmarco -%}"),
        source=SOURCE,
        also=("NB507",),
        repaired=True,
    ),
    Defect(
        "template-escape",
        "NB508",
        BASE,
        "The template reaches for Python's classes.",
        with_template(ESCAPE),
        origin="thread: https://nvd.nist.gov/vuln/detail/CVE-2026-5760",
        repaired=True,
    ),
    Defect(
        "template-endless",
        "NB508",
        BASE,
        "The loops never end.",
        with_template(ENDLESS),
        repaired=True,
    ),
    Defect(
        "template-doubled",
        "NB508",
        BASE,
        "One comparison of two lists that hold themselves 2^60 times never ends.",
        with_template(DOUBLED),
        repaired=True,
    ),
    Defect(
        "template-without-words",
        "NB508",
        BASE,
        "The prompt lacks what the user said.",
        with_template("{{- '<|im_start|>assistant\\n' -}}"),
        repaired=True,
    ),
    Defect(
        "template-no-user",
        "NB509",
        BASE,
        "Without a user turn: No user query found in messages.",
        replaced(
            "{%- if tools -%}",
            NO_USER + "{{- raise_exception('No user query found in messages.') -}}{%- endif -%}"
            "{%- if tools -%}",
        ),
        origin="thread: https://github.com/langgenius/dify/issues/33152",
        severity="note",
    ),
    Defect(
        "template-no-user-breaks",
        "NB509",
        BASE,
        "Without a user turn the template breaks.",
        replaced(
            "{%- if tools -%}", NO_USER + "{{- none.role.name -}}{%- endif -%}{%- if tools -%}"
        ),
    ),
    Defect(
        "template-no-tool-turn",
        "NB510",
        BASE,
        "Tool calls are left out of the prompt.",
        with_template(NO_TOOLS),
    ),
    Defect(
        "template-null-content",
        "NB510",
        BASE,
        "A turn of tool calls with null as content breaks the template.",
        replaced("{%- elif content is not none and content is defined -%}", "{%- else -%}"),
        severity="note",
    ),
    Defect(
        "template-developer",
        "NB511",
        BASE,
        "The role developer is refused.",
        replaced("('system', 'developer')", "('system',)"),
    ),
    Defect(
        "template-string-arguments",
        "NB512",
        BASE,
        "Tool arguments must be an object.",
        replaced("{%- if f.arguments is mapping -%}", "{%- if true -%}"),
    ),
    Defect(
        "template-no-image",
        "NB513",
        BASE,
        "Images leave no trace in the prompt, though config.json has a vision tower.",
        replaced("<|vision_start|><|image_pad|><|vision_end|>", ""),
        source=SOURCE,
        also=("NB507",),
        repaired=True,
    ),
    Defect(
        "template-drops-thinking",
        "NB514",
        BASE,
        "preserve_thinking is unknown to the template.",
        replaced(" or preserve_thinking)", ")"),
        origin="thread: https://github.com/earendil-works/pi/issues/3325",
    ),
    Defect(
        "template-twins",
        "NB517",
        BASE,
        "tokenizer_config.json holds another template than chat_template.jinja.",
        with_keys(TOKENIZER_CONFIG, chat_template=NO_TOOLS),
        source=SOURCE,
        repaired=True,
    ),
    Defect(
        "generation-missing",
        "NB515",
        BASE,
        "generation_config.json was not copied.",
        without(GENERATION),
        source=SOURCE,
        also=("NB518",),
        repaired=True,
    ),
    Defect(
        "generation-temperature",
        "NB515",
        BASE,
        "Default sampling is hotter than the source's.",
        with_keys(GENERATION, temperature=1.0),
        source=SOURCE,
        repaired=True,
    ),
    Defect(
        "processor-missing",
        "NB516",
        BASE,
        "preprocessor_config.json was not copied.",
        without("preprocessor_config.json"),
        origin="tool: nvidia-modelopt 0.47 export_hf_checkpoint writes no processor",
        source=SOURCE,
        repaired=True,
    ),
    Defect(
        "known-bad-hook",
        "NB590",
        "source-dense",
        "A hook to code, which released versions of engines follow.",
        auto_map,
        also=("NB501",),
    ),
]
