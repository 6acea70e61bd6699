"""Which config group transformers' modules get, by compressed-tensors' own functions.

    transformers_replay.py FOLDER...

Runs in the environment compressed-tensors. The model of each folder's config.json is made without
memory, as `from_pretrained` names it; then `match_named_modules`, `match_targets` and
`_scheme_from_targets` are asked. Prints one JSON line per folder: {module: group, "" for none} of
every linear and embedding, or the error of reading the configuration.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def make(folder):
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    wrapped = "vision_config" in config.to_dict()
    loader = (
        transformers.AutoModelForImageTextToText if wrapped else transformers.AutoModelForCausalLM
    )
    section = config.to_dict().get("quantization_config")
    config.quantization_config = None
    del config.quantization_config
    with torch.device("meta"):
        return loader.from_config(config), section


def groups_of(model, section):
    import torch
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.lifecycle.apply import _scheme_from_targets
    from compressed_tensors.utils.match import match_named_modules, match_targets
    from transformers import CompressedTensorsConfig

    config = ModelCompressor.from_compression_config(
        CompressedTensorsConfig.from_dict(section)
    ).quantization_config
    names = {id(group): name for name, group in config.config_groups.items()}
    targets = {t: group for group in config.config_groups.values() for t in group.targets}
    found = {
        name: ""
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
    }
    for name, module in match_named_modules(model, targets, config.ignore):
        if name in found:
            matched = match_targets(name, module, targets)
            found[name] = names[id(_scheme_from_targets(targets, matched, name))]
    return found


def main():
    for folder in sys.argv[1:]:
        row = {"tool": "compressed-tensors", "folder": folder}
        try:
            row |= {"ok": True, "groups": groups_of(*make(Path(folder)))}
        except Exception as error:
            row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
        sys.stdout.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
