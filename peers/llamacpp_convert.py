"""Convert a checkpoint with llama.cpp's own converter and read the result back with its gguf.

    llamacpp_convert.py CKPT OUT.gguf [--dump OUT.safetensors] [--source DIR]

Runs in the environment llamacpp. One thing is patched: an unknown tokenizer counts as qwen2's, so
that test models with their own vocabulary convert. A Qwen3.5 checkpoint without MTP tensors is
converted with --no-nextn, because the converter asserts that it finds some. `--dump` writes every
GGUF tensor under its GGUF name, as float32 from gguf's `dequantize`; an NVFP4 tensor is then the
product of codes and block scales, and its tensor scale is the separate tensor NAME.scale, as in
the file. Prints one JSON line with the tensor count by type and the sha256 of the tensor data.
"""

import argparse
import collections
import hashlib
import json
import os
import runpy
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path


def lacks_mtp(checkpoint: Path) -> bool:
    """Whether this is a Qwen3.5-family checkpoint whose files hold no MTP tensor."""
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text())
    if not config["model_type"].startswith(("qwen3_5", "qwen3_next")):
        return False
    for shard in checkpoint.glob("*.safetensors"):
        with safe_open(shard, "np") as tensors:
            if any(name.startswith(("mtp.", "model.mtp.")) for name in tensors.keys()):
                return False
    return True


def convert(checkpoint: str, out: str, source: Path) -> None:
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import conversion.base

    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    script = str(source / "convert_hf_to_gguf.py")
    sys.argv = [script, checkpoint, "--outfile", out, "--outtype", "bf16"]
    if lacks_mtp(Path(checkpoint)):
        sys.argv.append("--no-nextn")
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"convert_hf_to_gguf.py stopped with {stop.code}") from stop


def read_back(path: str, dump: Path | None) -> dict[str, object]:
    import gguf
    import numpy as np
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(path)
    types = collections.Counter(tensor.tensor_type.name for tensor in reader.tensors)
    digest = hashlib.sha256()
    dense, not_finite = {}, []
    for tensor in sorted(reader.tensors, key=lambda t: t.name):
        digest.update(tensor.name.encode() + np.ascontiguousarray(tensor.data).tobytes())
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        values = values.reshape(
            [int(n) for n in reversed(tensor.shape)]
        )  # GGUF lists the fastest dimension first
        if not np.isfinite(values).all():
            not_finite.append(tensor.name)
        if dump is not None:
            dense[tensor.name] = values
    if dump is not None:
        save_file(dense, dump)
    field = reader.get_field("general.architecture")
    return {
        "ok": True,
        "architecture": field.contents() if field else None,
        "tensors": len(reader.tensors),
        "types": dict(types),
        "scales": sum(t.name.endswith(".scale") for t in reader.tensors),
        "data_sha256": digest.hexdigest(),
        "not_finite": not_finite[:20],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    parser.add_argument("--dump", type=Path)
    parser.add_argument("--source", type=Path, default=Path(sys.prefix) / "source")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    row: dict[str, object] = {"tool": "llama.cpp"}
    try:
        with redirect_stdout(sys.stderr):
            convert(options.checkpoint, options.out, options.source)
            row |= read_back(options.out, options.dump)
    except Exception as error:
        traceback.print_exc()
        row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
    sys.stdout.write(json.dumps(row) + "\n")
    return 0 if row["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
