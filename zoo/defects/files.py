"""Defects of files: shards, headers, the index, links, pickles (NB001-NB023)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from folder import INDEX, Defect, Folder, read_shard, write_shard

GITHUB = "https://github.com/"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "mtp.norm.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"

Header = dict[str, Any]


def read_header(path: Path) -> tuple[Header, bytes]:
    """The header of a shard, and its data."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(path: Path, header: Header | bytes, data: bytes) -> None:
    """A shard of a header as it is given, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def in_header(change: Callable[[Header], None], file: str = FIRST) -> Callable[[Path], None]:
    """A change of one shard's header, the data left alone."""

    def after(path: Path) -> None:
        header, data = read_header(path / file)
        change(header)
        write_header(path / file, header, data)

    return after


def in_index(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """A change of the index."""

    def after(path: Path) -> None:
        index = json.loads((path / INDEX).read_text())
        change(index)
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    return after


def in_text(name: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    """A change of a file's text."""

    def after(path: Path) -> None:
        (path / name).write_text(change((path / name).read_text()))

    return after


def last_tensor(header: Header) -> str:
    return max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])


# ------------------------------------------------------------------------------------------ shards


def truncate(path: Path) -> None:
    data = (path / SECOND).read_bytes()
    (path / SECOND).write_bytes(data[: len(data) * 3 // 4])


def cut_all_data(path: Path) -> None:
    """The header arrived, nothing else did."""
    data = (path / SECOND).read_bytes()
    (path / SECOND).write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])


def lfs_pointer(path: Path) -> None:
    size = (path / SECOND).stat().st_size
    (path / SECOND).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize {size}\n"
    )


def hostile_length(path: Path) -> None:
    data = (path / FIRST).read_bytes()
    (path / FIRST).write_bytes((1 << 62).to_bytes(8, "little") + data[8:])


def overlap(header: Header) -> None:
    """The last tensor begins inside the one before it."""
    begin, end = header[last_tensor(header)]["data_offsets"]
    header[last_tensor(header)]["data_offsets"] = [begin - 16, end - 16]


def hole(path: Path) -> None:
    header, data = read_header(path / FIRST)
    begin, end = header[last_tensor(header)]["data_offsets"]
    header[last_tensor(header)]["data_offsets"] = [begin + 64, end + 64]
    write_header(path / FIRST, header, data[:begin] + b"\0" * 64 + data[begin:])


def wrong_shape(header: Header) -> None:
    """More elements than bytes."""
    header[EMBEDDING]["shape"][0] += 1


def huge_shape(header: Header) -> None:
    """A product that overflows 64 bits."""
    header[EMBEDDING]["shape"] = [1 << 40, 1 << 40]


def broken_header(path: Path) -> None:
    header, data = read_header(path / FIRST)
    write_header(path / FIRST, json.dumps(header).encode()[:-1], data)


def twice_in_header(path: Path) -> None:
    """A key of the header stands twice: readers disagree which of them counts."""
    header, data = read_header(path / FIRST)
    text = json.dumps(header)
    entry = json.dumps({"lm_head.weight": header[EMBEDDING]})[1:-1]
    write_header(path / FIRST, (text[:-1] + ", " + entry + ", " + entry + "}").encode(), data)


def trailing(path: Path) -> None:
    with (path / FIRST).open("ab") as file:
        file.write(b"\0" * 4096)


def headers_only(path: Path) -> None:
    for file in path.glob("*.safetensors"):
        data = file.read_bytes()
        file.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])


def experts_in_words(folder: Folder) -> None:
    config = folder.document("config.json")
    config["text_config"]["num_experts"] = "two"
    folder.put("config.json", config)


def no_weights(path: Path) -> None:
    for file in path.glob("*.safetensors*"):
        file.unlink()


# ----------------------------------------------------------------------------- which shards count


def orphan_with_head(path: Path) -> None:
    """lm_head lies in a file that the index does not know."""
    tensors = read_shard(path / FIRST)
    head = {n: tensors.pop(n) for n in list(tensors) if n.startswith("lm_head.")}
    write_shard(path / FIRST, tensors)
    write_shard(path / "model-head.safetensors", head)

    def change(index: dict[str, Any]) -> None:
        for name in head:
            del index["weight_map"][name]
        index["metadata"]["total_size"] -= sum(t.nbytes for t in head.values())

    in_index(change)(path)


def stale_copy(path: Path) -> None:
    shutil.copyfile(path / SECOND, path / "model-00002-of-00002-old.safetensors")


def adapter_beside(path: Path) -> None:
    """Weights of something else: nothing of the model."""
    values = np.ones((4, 8), dtype=ml_dtypes.bfloat16)
    write_shard(path / "adapter_model.safetensors", {"base_model.lora_A.weight": values})


def twice(change: bool) -> Callable[[Path], None]:
    """A norm that belongs to the second shard in the first one too, equal or not."""

    def after(path: Path) -> None:
        norm = read_shard(path / SECOND)[NORM]
        tensors = read_shard(path / FIRST)
        tensors[NORM] = norm + norm if change else norm
        write_shard(path / FIRST, tensors)

    return after


def lost_shard_of_three(path: Path) -> None:
    """What a saver leaves that skips a file whole because it held MTP tensors: the index is made
    of the files that were written."""
    for old, new in ((FIRST, "model-00001-of-00003"), (SECOND, "model-00003-of-00003")):
        (path / old).rename(path / f"{new}.safetensors")
    first = path / "model-00001-of-00003.safetensors"
    tensors = read_shard(first)
    for name in [n for n in tensors if n.startswith(("lm_head.", "mtp."))]:
        del tensors[name]
    write_shard(first, tensors)
    shards = {file.name: read_shard(file) for file in sorted(path.glob("*.safetensors"))}
    weight_map = {n: file for file, held in shards.items() for n in held}
    total = sum(t.nbytes for held in shards.values() for t in held.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def numbered_without_index(path: Path) -> None:
    (path / INDEX).unlink()
    (path / SECOND).unlink()


def lone_name(path: Path) -> None:
    (path / FIRST).rename(path / "model.safetensors")
    (path / SECOND).rename(path / "model_mtp.safetensors")
    names = {FIRST: "model.safetensors", SECOND: "model_mtp.safetensors"}

    def change(index: dict[str, Any]) -> None:
        index["weight_map"] = {n: names[f] for n, f in index["weight_map"].items()}

    in_index(change)(path)


# ---------------------------------------------------------------------------------------- the index


def names_absent_tensor(index: dict[str, Any]) -> None:
    name = "model.language_model.layers.2.mlp.shared_expert.down_proj.weight"
    index["weight_map"][name] = FIRST


def names_wrong_file(index: dict[str, Any]) -> None:
    swapped = {FIRST: SECOND, SECOND: FIRST}
    index["weight_map"][EMBEDDING] = swapped[index["weight_map"][EMBEDDING]]


def names_parent(index: dict[str, Any]) -> None:
    index["weight_map"]["model.extra.weight"] = "../../secret.safetensors"


# ------------------------------------------------------------------------------------ other files


def escaping_link(path: Path) -> None:
    (path / "tokenizer_config.json").unlink()
    (path / "tokenizer_config.json").symlink_to("/etc/hostname")


def dangling_link(path: Path) -> None:
    (path / "preprocessor_config.json").unlink()
    (path / "preprocessor_config.json").symlink_to("../blobs/absent")


def pickle(name: str) -> Callable[[Path], None]:
    """A pickle that would run code; it says so in the clear and does nothing worse than print."""

    def after(path: Path) -> None:
        (path / name).write_bytes(b"\x80\x04cbuiltins\nprint\n(V" + b"a pickle ran\ntR.")

    return after


def pickles_only(path: Path) -> None:
    no_weights(path)
    pickle("pytorch_model.bin")(path)


def without(*keys: str) -> Callable[[Folder], None]:
    """config.json without a key."""

    def plant(folder: Folder) -> None:
        config = folder.document("config.json")
        inner = config
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        folder.put("config.json", config)

    return plant


def other_type(folder: Folder) -> None:
    config = folder.document("config.json")
    config["model_type"] = config["text_config"]["model_type"] = "unheard_of"
    folder.put("config.json", config)


def unreadable_declaration(folder: Folder) -> None:
    config = folder.document("config.json")
    config["quantization_config"]["ignore"] = {"lm_head": True}
    folder.put("config.json", config)


DEFECTS = [
    Defect(
        "shard-missing",
        "NB001",
        "nybble-modelopt",
        "The second of two files is not there, and the index names it",
        after=lambda path: (path / SECOND).unlink(),
        origin=f"thread: {GITHUB}sgl-project/sglang/issues/32279",
    ),
    Defect(
        "shard-truncated",
        "NB002",
        "nybble-modelopt",
        "The second file ends after three quarters of its bytes",
        after=truncate,
        origin=f"thread: {GITHUB}osaurus-ai/vmlx-swift/issues/217",
    ),
    Defect(
        "shard-without-data",
        "NB002",
        "nybble-ct",
        "The second file ends after its header, the first is whole",
        after=cut_all_data,
    ),
    Defect(
        "shard-is-lfs-pointer",
        "NB003",
        "nybble-modelopt",
        "The second file is the pointer that Git LFS leaves when it is not installed",
        after=lfs_pointer,
    ),
    Defect(
        "header-length-hostile",
        "NB003",
        "nybble-modelopt",
        "The header claims 2^62 bytes",
        after=hostile_length,
    ),
    Defect(
        "header-overlap",
        "NB003",
        "nybble-modelopt",
        "The last tensor overlaps the one before it",
        after=in_header(overlap),
    ),
    Defect(
        "header-hole",
        "NB003",
        "nybble-ct",
        "64 bytes between two tensors belong to none",
        after=hole,
    ),
    Defect(
        "header-shape-not-size",
        "NB003",
        "nybble-modelopt",
        "A shape with more elements than the tensor has bytes",
        after=in_header(wrong_shape),
    ),
    Defect(
        "header-shape-overflow",
        "NB003",
        "nybble-modelopt",
        "A shape whose product does not fit into 64 bits",
        after=in_header(huge_shape),
    ),
    Defect(
        "header-no-json",
        "NB003",
        "nybble-modelopt",
        "The header lacks its last brace",
        after=broken_header,
    ),
    Defect(
        "header-key-twice",
        "NB003",
        "nybble-w4a4",
        "The header has one tensor's name twice",
        after=twice_in_header,
    ),
    Defect(
        "trailing-bytes",
        "NB004",
        "nybble-modelopt",
        "4096 bytes after the last tensor",
        after=trailing,
        repaired=True,
    ),
    Defect(
        "orphan-with-lm-head",
        "NB023",
        "nybble-modelopt",
        "lm_head lies in a file that the index does not name",
        after=orphan_with_head,
        also=("NB119",),
        repaired=True,
    ),
    Defect(
        "orphan-stale-copy",
        "NB005",
        "nybble-modelopt",
        "A second copy of a file, left from an earlier run",
        after=stale_copy,
        origin=f"thread: {GITHUB}intel/auto-round/issues/2350",
        repaired=True,
    ),
    Defect(
        "orphan-adapter",
        "NB005",
        "nybble-modelopt",
        "An adapter's weights lie beside the model's",
        after=adapter_beside,
        repaired=True,
    ),
    Defect(
        "tensor-twice-different",
        "NB006",
        "nybble-modelopt",
        "The norm of the MTP head is in both files, with different values",
        after=twice(change=True),
        repaired=True,
    ),
    Defect(
        "tensor-twice-equal",
        "NB006",
        "nybble-modelopt",
        "The norm of the MTP head is in both files",
        after=twice(change=False),
        repaired=True,
        severity="warning",
    ),
    Defect(
        "index-names-absent-tensor",
        "NB007",
        "nybble-modelopt",
        "The index names a weight of a third layer that no file holds",
        after=in_index(names_absent_tensor),
        repaired=True,
    ),
    Defect(
        "index-names-wrong-file",
        "NB007",
        "nybble-modelopt",
        "The index places the embedding in the other file",
        after=in_index(names_wrong_file),
        severity="warning",
        repaired=True,
    ),
    Defect(
        "tensor-not-in-index",
        "NB008",
        "nybble-modelopt",
        "The index does not list the embedding",
        after=in_index(lambda index: index["weight_map"].pop(EMBEDDING)),
        repaired=True,
    ),
    Defect(
        "config-no-json",
        "NB009",
        "nybble-modelopt",
        "config.json ends in a comma",
        after=in_text("config.json", lambda text: text.rstrip().removesuffix("}") + ","),
    ),
    Defect(
        "config-key-twice",
        "NB009",
        "nybble-modelopt",
        "config.json says model_type twice",
        after=in_text("config.json", lambda t: t.replace("{", '{"model_type": "llama",', 1)),
    ),
    Defect(
        "quant-config-no-object",
        "NB009",
        "nybble-modelopt",
        "hf_quant_config.json is a list",
        after=in_text("hf_quant_config.json", lambda text: f"[{text}]"),
    ),
    Defect(
        "link-leaves-folder",
        "NB010",
        "nybble-modelopt",
        "tokenizer_config.json is a link to a file of the system",
        after=escaping_link,
    ),
    Defect(
        "link-dangles",
        "NB010",
        "nybble-modelopt",
        "preprocessor_config.json is a link to nothing",
        after=dangling_link,
    ),
    Defect(
        "pickled-weights-beside",
        "NB011",
        "nybble-modelopt",
        "pytorch_model.bin, a pickle that prints, lies beside the weights",
        after=pickle("pytorch_model.bin"),
        repaired=True,
    ),
    Defect(
        "pickled-weights-only",
        "NB011",
        "source-dense",
        "pytorch_model.bin is all there is",
        after=pickles_only,
        also=("NB021",),
        severity="error",
    ),
    Defect(
        "index-total-size",
        "NB012",
        "nybble-modelopt",
        "metadata.total_size is that of the unquantized model",
        after=in_index(lambda index: index["metadata"].update(total_size=398_824)),
        repaired=True,
    ),
    Defect(
        "headers-only",
        "NB013",
        "nybble-modelopt",
        "Both files end after their headers",
        after=headers_only,
    ),
    Defect(
        "quantization-unreadable",
        "NB014",
        "nybble-modelopt",
        "`ignore` is an object",
        plant=unreadable_declaration,
        repaired=True,
    ),
    Defect(
        "no-config",
        "NB015",
        "nybble-dense",
        "There is no config.json",
        after=lambda path: (path / "config.json").unlink(),
    ),
    Defect(
        "index-path-leaves-folder",
        "NB016",
        "nybble-modelopt",
        "The index places a tensor in ../../secret.safetensors",
        after=in_index(names_parent),
    ),
    Defect(
        "index-without-map",
        "NB016",
        "nybble-modelopt",
        "The index has no weight_map",
        after=in_index(lambda index: index.pop("weight_map")),
    ),
    Defect(
        "saver-skipped-shard",
        "NB017",
        "source",
        "Files 1 and 3 of 3 and an index made of them: lm_head and MTP tensors went with file 2",
        after=lost_shard_of_three,
        origin=f"thread: {GITHUB}areal-project/AReaL/pull/1403",
        also=("NB101", "NB119"),
        source="source",
        severity="warning",
    ),
    Defect(
        "numbered-shard-alone",
        "NB017",
        "nybble-modelopt",
        "File 1 of 2 without file 2 and without an index",
        after=numbered_without_index,
        also=("NB104", "NB107"),
    ),
    Defect(
        "lone-name-beside-others",
        "NB018",
        "nybble-ct",
        "model.safetensors beside model_mtp.safetensors",
        after=lone_name,
        repaired=True,
    ),
    Defect(
        "model-beside-mtp-file",
        "NB018",
        "llmcompressor-moe",
        "model.safetensors beside model_mtp.safetensors and an index, as the tool writes them",
        origin="tool: llm-compressor 0.14.0.1 with compressed-tensors 0.19.0, oneshot NVFP4A16",
        repaired=True,
        clean="modelopt-moe",
    ),
    Defect(
        "two-files-without-index",
        "NB019",
        "nybble-modelopt",
        "Two files and no index",
        after=lambda path: (path / INDEX).unlink(),
        repaired=True,
    ),
    Defect(
        "config-without-size",
        "NB020",
        "nybble-modelopt",
        "config.json lacks moe_intermediate_size",
        plant=without("text_config", "moe_intermediate_size"),
    ),
    Defect(
        "size-that-is-a-word",
        "NB020",
        "nybble-modelopt",
        'config.json says that there are "two" experts',
        plant=experts_in_words,
        also=("NB601",),
        severity="error",
    ),
    Defect(
        "no-weights",
        "NB021",
        "nybble-dense",
        "There is no file with weights",
        after=no_weights,
    ),
    Defect(
        "unknown-model-type",
        "NB022",
        "nybble-modelopt",
        "A model type that nobody has heard of",
        plant=other_type,
    ),
]
