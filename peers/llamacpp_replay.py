"""What llama.cpp's converter makes of checkpoints, up to the bytes: nothing is written.

    llamacpp_replay.py REQUEST.json

Runs in the environment llamacpp. REQUEST is {folder: [names of modules as the converter files
them]}. Prints one JSON line per folder: whether `prepare_tensors` goes through, or its error, and
by module the type of its GGUF tensor (of experts that of each projection, joined by +) and whether
the tensor is tagged to get no four-bit activations.
"""

import json
import logging
import sys
from pathlib import Path


def types_of(instance, name):
    """GGUF types of a module; "" if it has no tensor."""
    held = {k: v.dtype.name for part in instance.gguf_writer.tensors for k, v in part.items()}
    leaves = [name]
    if name.endswith(".experts"):
        leaves = [f"{name}.{p}_proj" for p in ("gate", "up", "down")]
    found, tags = [], []
    for leaf in leaves:
        gguf_name = instance.tensor_map.get_name(leaf + ".weight", try_suffixes=(".weight",))
        if gguf_name is not None:
            gguf_name = gguf_name.removesuffix(".weight") + ".weight"
        found.append(held.get(gguf_name, ""))
        tags.append(instance._prec_a4.get(gguf_name, True))
    return ["+".join(sorted(set(found))), all(tags)]


def look(folder, names):
    import gguf
    from conversion import get_model_class
    from conversion.base import ModelBase, ModelType, get_model_architecture

    hparams = ModelBase.load_hparams(folder, False)
    model_class = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
    instance = model_class(folder, gguf.LlamaFileType.MOSTLY_BF16, folder / "never.gguf")
    instance.prepare_tensors()
    return {"ok": True, "types": {name: types_of(instance, name) for name in names}}


def main():
    source = Path(sys.prefix) / "source"
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    logging.disable(logging.CRITICAL)
    for folder, names in json.loads(Path(sys.argv[1]).read_text()).items():
        row = {"tool": "llama.cpp", "folder": folder}
        try:
            row |= look(Path(folder), names)
        except Exception as error:
            row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
        sys.stdout.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
