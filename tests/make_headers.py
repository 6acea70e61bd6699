#!/usr/bin/env python3
# ruff: noqa: C901, T201, UP031
"""Tensor lists and weightless checkpoints of qwen3_5 and qwen3_5_moe models, from config.json.

Standard library only, and independent of nybble: the tests hold one against the other.

  make_headers.py CONFIG             totals of the BF16 checkpoint (count, elements, bytes)
  make_headers.py CONFIG --list      one line per tensor: name, dtype, shape, bytes, shard
  make_headers.py CONFIG --out DIR   a checkpoint whose shards are holes (sparse files): true names,
                                     dtypes, shapes, offsets and sizes; all values zero
  ... --data none                    shards end after the header (a truncated file)
  ... --nvfp4-layout modelopt        the ModelOpt NVFP4 checkpoint that the quantization_config of
                                     CONFIG (or --quant FILE) describes
  ... --nvfp4-layout compressed-tensors
                                     the same for a compressed-tensors config (nvfp4-pack-quantized
                                     and float-quantized groups)
  make_headers.py --self-check DIR   compare with published figures; DIR holds the config folders

Tensor order and header text are those of the safetensors writer: widest dtype first, then name;
compact JSON, padded with spaces to a multiple of eight bytes. All values are zero, block scales
included, so a value check on such a directory must complain; everything else is true to the byte.
"""

import argparse
import fnmatch
import hashlib
import json
import math
import os
import re
import shutil
import sys

BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "U8": 1}
RANK = {"F32": 0, "BF16": 1, "F16": 2, "F8_E4M3": 3, "U8": 4}  # order inside a shard
TORCH = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
LM = "model.language_model."


class Refused(Exception):
    pass


def numel(shape):
    return math.prod(shape)


# ---------------------------------------------------------------- the BF16 model


def linears_of_attention(p, t):
    h, d, q, kv = (
        t["hidden_size"],
        t["head_dim"],
        t["num_attention_heads"],
        t["num_key_value_heads"],
    )
    gate = 2 if t.get("attn_output_gate", True) else 1
    yield p + "q_proj", (q * d * gate, h)
    yield p + "k_proj", (kv * d, h)
    yield p + "v_proj", (kv * d, h)
    yield p + "o_proj", (h, q * d)


def model_tensors(cfg, dtype, fused_experts, fused_mtp_experts, f32_gdn):
    """Yield (name, dtype, shape) in module order: vision, language model, lm_head, mtp."""
    t = cfg.get("text_config", cfg)
    kind = t.get("model_type", cfg.get("model_type"))
    if kind not in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe"):
        raise Refused(f"model_type {kind!r} is not qwen3_5 or qwen3_5_moe")
    h, vocab, layers = t["hidden_size"], t["vocab_size"], t["num_hidden_layers"]
    every = t.get("full_attention_interval", 4)
    types = t.get("layer_types") or [
        "full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)
    ]
    if len(types) != layers:
        raise Refused("layer_types has %d entries for %d layers" % (len(types), layers))
    moe = bool(t.get("num_experts"))

    def mlp(p, fused):
        if not moe:
            f = t["intermediate_size"]
            yield p + "gate_proj.weight", dtype, (f, h)
            yield p + "up_proj.weight", dtype, (f, h)
            yield p + "down_proj.weight", dtype, (h, f)
            return
        e, f, s = t["num_experts"], t["moe_intermediate_size"], t["shared_expert_intermediate_size"]
        yield p + "gate.weight", dtype, (e, h)
        if fused:
            yield p + "experts.gate_up_proj", dtype, (e, 2 * f, h)
            yield p + "experts.down_proj", dtype, (e, h, f)
        else:
            for i in range(e):
                q = "%sexperts.%d." % (p, i)
                yield q + "gate_proj.weight", dtype, (f, h)
                yield q + "up_proj.weight", dtype, (f, h)
                yield q + "down_proj.weight", dtype, (h, f)
        yield p + "shared_expert.gate_proj.weight", dtype, (s, h)
        yield p + "shared_expert.up_proj.weight", dtype, (s, h)
        yield p + "shared_expert.down_proj.weight", dtype, (h, s)
        yield p + "shared_expert_gate.weight", dtype, (1, h)

    def attention(p):
        for name, shape in linears_of_attention(p, t):
            yield name + ".weight", dtype, shape
        yield p + "q_norm.weight", dtype, (t["head_dim"],)
        yield p + "k_norm.weight", dtype, (t["head_dim"],)

    def gdn(p):
        nk, nv = t["linear_num_key_heads"], t["linear_num_value_heads"]
        dk, dv = t["linear_key_head_dim"], t["linear_value_head_dim"]
        conv = 2 * nk * dk + nv * dv
        state = "F32" if f32_gdn else dtype
        yield p + "dt_bias", dtype, (nv,)
        yield p + "A_log", state, (nv,)
        yield p + "conv1d.weight", dtype, (conv, 1, t["linear_conv_kernel_dim"])
        yield p + "norm.weight", state, (dv,)
        yield p + "out_proj.weight", dtype, (h, nv * dv)
        yield p + "in_proj_qkv.weight", dtype, (conv, h)
        yield p + "in_proj_z.weight", dtype, (nv * dv, h)
        yield p + "in_proj_b.weight", dtype, (nv, h)
        yield p + "in_proj_a.weight", dtype, (nv, h)

    def norms(p):
        yield p + "input_layernorm.weight", dtype, (h,)
        yield p + "post_attention_layernorm.weight", dtype, (h,)

    v = cfg.get("vision_config")
    if v:
        if v.get("deepstack_visual_indexes"):
            raise Refused("deepstack vision towers are not part of this family")
        p, vh, f = "model.visual.", v["hidden_size"], v["intermediate_size"]
        wide = vh * v["spatial_merge_size"] ** 2
        patch = (
            vh,
            v.get("in_channels", 3),
            v["temporal_patch_size"],
            v["patch_size"],
            v["patch_size"],
        )
        yield p + "patch_embed.proj.weight", dtype, patch
        yield p + "patch_embed.proj.bias", dtype, (vh,)
        yield p + "pos_embed.weight", dtype, (v["num_position_embeddings"], vh)
        for i in range(v["depth"]):
            b = "%sblocks.%d." % (p, i)
            for n, shape in (
                ("norm1", (vh,)),
                ("norm2", (vh,)),
                ("attn.qkv", (3 * vh, vh)),
                ("attn.proj", (vh, vh)),
                ("mlp.linear_fc1", (f, vh)),
                ("mlp.linear_fc2", (vh, f)),
            ):
                yield b + n + ".weight", dtype, shape
                yield b + n + ".bias", dtype, shape[:1]
        for n, shape in (
            ("norm", (vh,)),
            ("linear_fc1", (wide, wide)),
            ("linear_fc2", (v["out_hidden_size"], wide)),
        ):
            yield p + "merger." + n + ".weight", dtype, shape
            yield p + "merger." + n + ".bias", dtype, shape[:1]

    yield LM + "embed_tokens.weight", dtype, (vocab, h)
    for i, what in enumerate(types):
        p = "%slayers.%d." % (LM, i)
        if what == "full_attention":
            yield from attention(p + "self_attn.")
        elif what == "linear_attention":
            yield from gdn(p + "linear_attn.")
        else:
            raise Refused("layer %d: unknown layer type %r" % (i, what))
        yield from mlp(p + "mlp.", fused_experts)
        yield from norms(p)
    yield LM + "norm.weight", dtype, (h,)
    if not (t.get("tie_word_embeddings") or cfg.get("tie_word_embeddings")):
        yield "lm_head.weight", dtype, (vocab, h)

    depth = t.get("mtp_num_hidden_layers", 0)
    if depth:
        yield "mtp.fc.weight", dtype, (h, 2 * h)
        for i in range(depth):
            p = "mtp.layers.%d." % i
            yield from attention(p + "self_attn.")
            yield from mlp(p + "mlp.", fused_mtp_experts)
            yield from norms(p)
        for n in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            yield f"mtp.{n}.weight", dtype, (h,)


# ---------------------------------------------------------------- quantized layouts

LINEAR_LEAVES = frozenset(
    (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "in_proj_qkv",
        "in_proj_z",
        "in_proj_a",
        "in_proj_b",
        "out_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "shared_expert_gate",
        "qkv",
        "proj",
        "linear_fc1",
        "linear_fc2",
        "fc",
        "lm_head",
    )
)


def is_linear(module):
    return module.rsplit(".", 1)[-1] in LINEAR_LEAVES and not module.endswith("patch_embed.proj")


def modelopt_rule(quant):
    """Return module -> quant_algo or None, from the flat or the nested ModelOpt object."""
    q = quant.get("quantization", quant)
    listed = q.get("quantized_layers")
    skip = q.get("ignore", q.get("exclude_modules")) or []
    algo = q.get("quant_algo")
    if algo == "MIXED_PRECISION":
        if not listed:
            raise Refused("MIXED_PRECISION without quantized_layers")

        def rule(module):
            hit = listed.get(module)
            if hit is None:  # the routed experts are listed once, by their container
                m = re.match(r"(.*\.mlp\.experts)\.\d+\.[a-z_]+$", module)
                hit = m and listed.get(m.group(1))
            return hit["quant_algo"] if hit else None

        return rule
    if algo in ("NVFP4", "W4A16_NVFP4", "FP8"):

        def uniform(module):  # mtp.* is copied from the source whatever the list says
            if (
                module.startswith("mtp.")
                or not is_linear(module)
                or any(fnmatch.fnmatchcase(module, pattern) for pattern in skip)
            ):
                return None
            if any(
                not re.search(r"[*?\[]", pattern) and module.startswith(pattern + ".")
                for pattern in skip
            ):
                return None
            return algo

        return uniform
    raise Refused(f"quant_algo {algo!r} is not supported here")


def modelopt_tensors(module, algo, shape, residual_input_scale):
    n, k = shape
    if algo in ("NVFP4", "W4A16_NVFP4"):
        if k % 16:
            raise Refused("%s: K = %d is not a multiple of 16" % (module, k))
        yield module + ".weight", "U8", (n, k // 2)
        yield module + ".weight_scale", "F8_E4M3", (n, k // 16)
        yield module + ".weight_scale_2", "F32", ()
        if algo == "NVFP4" or residual_input_scale:
            yield module + ".input_scale", "F32", ()
    elif algo == "FP8":
        yield module + ".weight", "F8_E4M3", (n, k)
        yield module + ".weight_scale", "F32", ()
        yield module + ".input_scale", "F32", ()
    else:
        raise Refused(f"{module}: quant_algo {algo!r} is not supported here")


def ct_match(patterns, module):
    """compressed-tensors: re:<regex> anchored at the start, full path, or a class name (Linear)."""
    for p in patterns:
        if p.startswith("re:"):
            if re.match(p[3:], module):
                return True
        elif p == module or (p == "Linear" and is_linear(module) and module != "lm_head"):
            return True
    return False


def ct_rule(quant):
    groups = list(quant["config_groups"].values())
    skip = quant.get("ignore") or []

    def rule(module):
        if ct_match(skip, module):
            return None
        for g in groups:
            if ct_match(g["targets"], module):
                return g
        return None

    return rule


def ct_tensors(module, group, shape, scale_dtype, default_format):
    n, k = shape
    w, a = group["weights"], group.get("input_activations")
    fmt = group.get("format") or default_format
    if fmt == "nvfp4-pack-quantized":
        if k % 16:
            raise Refused("%s: K = %d is not a multiple of 16" % (module, k))
        yield module + ".weight_packed", "U8", (n, k // 2)
        yield module + ".weight_scale", "F8_E4M3", (n, k // 16)
        yield module + ".weight_global_scale", "F32", (1,)
        if a:
            yield module + ".input_global_scale", "F32", (1,)
    elif fmt == "float-quantized":
        yield module + ".weight", "F8_E4M3", (n, k)
        scale = {"tensor": (1,), "channel": (n, 1), "block": (-(-n // 128), -(-k // 128))}.get(
            w["strategy"]
        )
        if scale is None:
            raise Refused("{}: float-quantized with strategy {!r}".format(module, w["strategy"]))
        yield module + ".weight_scale", scale_dtype, scale
        if a and not a.get("dynamic"):
            yield module + ".input_scale", scale_dtype, (1,)
    else:
        raise Refused(f"{module}: format {fmt!r} is not supported here")


def checkpoint(
    cfg,
    layout=None,
    quant=None,
    fused=True,
    fused_mtp=True,
    f32_gdn=False,
    residual_input_scale=True,
    kv_scales=False,
):
    """The tensors of one checkpoint, in module order: a list of (name, dtype, shape)."""
    t = cfg.get("text_config", cfg)
    dtype = TORCH[t.get("dtype") or cfg.get("dtype") or cfg.get("torch_dtype") or "bfloat16"]
    if layout is None:
        return list(model_tensors(cfg, dtype, fused, fused_mtp, f32_gdn))
    if not quant:
        raise Refused("no quantization_config: give --quant FILE")
    rule = modelopt_rule(quant) if layout == "modelopt" else ct_rule(quant)
    out, done = [], 0
    for name, dt, shape in model_tensors(cfg, dtype, False, fused_mtp, f32_gdn):
        module = name[:-7] if name.endswith(".weight") and len(shape) == 2 else None
        hit = rule(module) if module else None
        if hit is None:
            out.append((name, dt, shape))
        else:
            done += 1
            if layout == "modelopt":
                out.extend(modelopt_tensors(module, hit, shape, residual_input_scale))
            else:
                out.extend(ct_tensors(module, hit, shape, dtype, quant.get("format")))
    if not done:
        raise Refused("the quantization config matches no module")
    if kv_scales:
        for i, what in enumerate(t["layer_types"]):
            if what == "full_attention":
                p = "%slayers.%d.self_attn." % (LM, i)
                if layout == "modelopt":
                    out += [(p + "k_proj.k_scale", "F32", ()), (p + "v_proj.v_scale", "F32", ())]
                else:
                    out += [(p + "k_scale", dtype, (1,)), (p + "v_scale", dtype, (1,))]
    if fused and not any(
        re.search(r"\.experts\.0\.gate_proj\.weight_scale$", n) for n, _, _ in out
    ):
        out = list(fuse_experts(cfg, out, dtype))
    return out


def fuse_experts(cfg, tensors, dtype):
    """Put unquantized routed experts back into their fused 3-D form."""
    t = cfg.get("text_config", cfg)
    seen = set()
    for name, dt, shape in tensors:
        m = re.match(r"(model\..*\.mlp\.experts)\.\d+\.", name)
        if not m:
            yield name, dt, shape
        elif m.group(1) not in seen:
            seen.add(m.group(1))
            e, f, h = t["num_experts"], t["moe_intermediate_size"], t["hidden_size"]
            yield m.group(1) + ".gate_up_proj", dtype, (e, 2 * f, h)
            yield m.group(1) + ".down_proj", dtype, (e, h, f)


# ---------------------------------------------------------------- shards and files


def size(entry):
    return numel(entry[2]) * BYTES[entry[1]]


def split(tensors, limit):
    """Fill shards in order, as huggingface_hub does; a larger tensor gets its own shard."""
    shards, now, used = [], [], 0
    for entry in tensors:
        n = size(entry)
        if n > limit:
            shards.append([entry])
            continue
        if now and used + n > limit:
            shards.append(now)
            now, used = [], 0
        now.append(entry)
        used += n
    if now:
        shards.append(now)
    return shards


def header(shard, metadata=True):
    """The eight length bytes and the JSON header of one shard, and its payload size."""
    rows, at = ['"__metadata__":{"format":"pt"}'] if metadata else [], 0
    for name, dt, shape in sorted(shard, key=lambda e: (RANK[e[1]], e[0])):
        n = numel(shape) * BYTES[dt]
        rows.append(
            '"%s":{"dtype":"%s","shape":[%s],"data_offsets":[%d,%d]}'
            % (name, dt, ",".join(map(str, shape)), at, at + n)
        )
        at += n
    text = ("{" + ",".join(rows) + "}").encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, at


def files(tensors, limit, layout=None, metadata=True):
    """[(file name, tensors, header has __metadata__)], as the usual writer of that layout does."""
    aside = []
    if (
        layout == "compressed-tensors"
    ):  # llm-compressor copies the MTP tensors into a file of their own, without metadata
        aside = [e for e in tensors if e[0].startswith("mtp.")]
        tensors = [e for e in tensors if not e[0].startswith("mtp.")]
    shards = split(tensors, limit)
    if len(shards) == 1:
        out = [("model.safetensors", shards[0], metadata)]
    else:
        out = [
            ("model-%05d-of-%05d.safetensors" % (i + 1, len(shards)), s, metadata)
            for i, s in enumerate(shards)
        ]
    return out + ([("model_mtp.safetensors", aside, False)] if aside else [])


SCALES = (
    "weight_scale",
    "weight_scale_2",
    "input_scale",
    "weight_global_scale",
    "input_global_scale",
    "k_scale",
    "v_scale",
)


def index(parts):
    """The index as transformers 5 writes it: total_parameters leaves out scales and mtp.*."""
    meta = {
        "total_parameters": sum(
            numel(e[2])
            for _, s, _ in parts
            for e in s
            if not e[0].startswith("mtp.") and not e[0].endswith(SCALES)
        ),
        "total_size": sum(size(e) for _, s, _ in parts for e in s),
    }
    weight_map = {e[0]: name for name, s, _ in parts for e in s}
    return json.dumps({"metadata": meta, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def write(out, parts, config_path, extra, data):
    os.makedirs(out, exist_ok=True)
    for name, shard, metadata in parts:
        head, payload = header(shard, metadata)
        with open(os.path.join(out, name), "wb") as f:
            f.write(head)
            if data == "sparse":
                f.truncate(len(head) + payload)
    if len(parts) > 1:
        with open(os.path.join(out, "model.safetensors.index.json"), "w") as f:
            f.write(index(parts))
    shutil.copyfile(config_path, os.path.join(out, "config.json"))
    for path in extra:
        if os.path.exists(path):
            shutil.copyfile(path, os.path.join(out, os.path.basename(path)))


def totals(tensors):
    by = {}
    for e in tensors:
        by[e[1]] = by.get(e[1], 0) + numel(e[2])
    return {
        "tensors": len(tensors),
        "elements": sum(by.values()),
        "bytes": sum(map(size, tensors)),
        "by_dtype": by,
    }


# ---------------------------------------------------------------- published figures

A, B = "nvidia--Qwen3.6-35B-A3B-NVFP4", "nvidia--Qwen3.6-27B-NVFP4"
Q35 = {
    "fused_mtp": False,
    "f32_gdn": True,
}  # the 3.5 releases: MTP experts split, A_log and GDN norm in F32
M35 = {"layout": "modelopt"}
M27 = {"layout": "modelopt", "metadata": False}
CT = {
    "layout": "compressed-tensors",
    "quant": "transcribed/Qwen3.8-27B-compressed-tensors-mixed.json",
    "kv_scales": True,
}
PUBLISHED = [  # folder, options, what, figure, where the figure comes from
    (A, {}, "tensors", 1045, "inventory of Qwen3.6-35B-A3B"),
    (A, {}, "elements", 35951822704, "published parameter count"),
    (A, {}, "language", 34660610688, "the same without vision and MTP"),
    (A, {}, "bytes", 71903645408, "total_size of the BF16 index"),
    (B, {}, "tensors", 1199, "inventory of Qwen3.6-27B"),
    (B, {}, "elements", 27781427952, "published parameter count"),
    (B, {}, "bytes", 55562855904, "two bytes per parameter"),
    ("Qwen--Qwen3.5-35B-A3B", Q35, "tensors", 1811, "inventory of Qwen3.5-35B-A3B"),
    (
        "Qwen--Qwen3.5-122B-A10B",
        Q35,
        "elements",
        125086497008,
        "published parameter count (of them 6912 F32)",
    ),
    ("Qwen--Qwen3.5-397B-A17B", Q35, "tensors", 2924, "inventory of Qwen3.5-397B-A17B"),
    ("Qwen--Qwen3.5-397B-A17B", Q35, "elements", 403397928944, "published parameter count"),
    ("Qwen--Qwen3.5-397B-A17B", Q35, "bytes", 806795875168, "payload of the release"),
    ("Qwen--Qwen3.5-122B-A10B", Q35, "bytes", 250173007840, "payload of the release"),
    (
        "nvidia--Qwen3.5-122B-A10B-NVFP4",
        {"layout": "modelopt", "fused_mtp": False},
        "bytes",
        83474870752,
        "payload of the release",
    ),
    (A, M35, "tensors", 124468, "index of the release"),
    (A, M35, "bytes", 23407580856, "total_size of the index"),
    (A, M35, "files", 23424338320, "bytes of the three downloaded files"),
    (A, M35, "file 1", 10006877608, "size of shard 1"),
    (
        A,
        M35,
        "index",
        "d67403a4e9793c0ba8a136baf14b3b76ec7b32c822267978084895e07ebd8a3e",
        "sha256 of the published index",
    ),
    (B, M27, "tensors", 2194, "index of the release"),
    (B, M27, "bytes", 21921428072, "total_size of the index"),
    (B, M27, "file 1", 9965652512, "size of shard 1"),
    (B, M27, "file 2", 9985757032, "size of shard 2"),
    (B, M27, "file 3", 1970287640, "size of shard 3"),
    (
        B,
        M27,
        "index",
        "7aa103a2582b7d26631988de33dea19e8a308ee9c239e8e14feb374af30905e2",
        "sha256 of the published index",
    ),
    (B, CT, "tensors", 1968, "Qwen3.8-27B compressed-tensors mixed: 1953 + 15"),
    (B, CT, "file 1", 22568192096, "its model.safetensors"),
    (B, CT, "file 2", 849400392, "its model_mtp.safetensors"),
]


def load(path):
    with open(path) as f:
        return json.load(f)


def figures(folder, name, opts):
    opts = dict(opts)
    cfg = load(os.path.join(folder, name, "config.json"))
    quant = opts.pop("quant", None)
    quant = (
        load(os.path.join(folder, quant))["quantization_config"]
        if quant
        else cfg.get("quantization_config")
    )
    metadata = opts.pop("metadata", True)
    tensors = checkpoint(cfg, quant=quant, **opts)
    parts = files(
        tensors,
        50e9 if opts.get("layout") == "compressed-tensors" else 10e9,
        opts.get("layout"),
        metadata,
    )
    out = totals(tensors)
    out["language"] = sum(
        numel(e[2]) for e in tensors if not e[0].startswith(("mtp.", "model.visual."))
    )
    out["files"] = 0
    for i, (_, shard, meta) in enumerate(parts):
        head, payload = header(shard, meta)
        out["file %d" % (i + 1)] = len(head) + payload
        out["files"] += len(head) + payload
    out["index"] = hashlib.sha256(index(parts).encode()).hexdigest()
    return out


def self_check(folder):
    bad, cache = 0, {}
    for name, opts, what, want, where in PUBLISHED:
        if not os.path.exists(os.path.join(folder, name, "config.json")):
            print(f"skip  {name} (no config)")
            continue
        key = (name, str(opts))
        if key not in cache:
            cache[key] = figures(folder, name, opts)
        have = cache[key][what]
        bad += have != want
        print(
            "%s %-30s %-18s %-9s %15s  %s"
            % (
                "same" if have == want else "DIFF",
                name,
                opts.get("layout", "bf16"),
                what,
                str(have)[:15],
                where if have == want else f"published {want}: {where}",
            )
        )
    return bad


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("config", nargs="?", help="config.json of a qwen3_5 or qwen3_5_moe model")
    ap.add_argument("--nvfp4-layout", choices=("modelopt", "compressed-tensors"))
    ap.add_argument(
        "--quant",
        help="hf_quant_config.json, or a file with a quantization_config; default: in CONFIG",
    )
    ap.add_argument(
        "--no-input-scale",
        action="store_true",
        help="W4A16 modules without the residual input_scale",
    )
    ap.add_argument(
        "--kv-scales",
        action="store_true",
        help="add calibrated FP8 KV scales of the full-attention layers",
    )
    ap.add_argument(
        "--experts",
        choices=("fused", "split"),
        default="fused",
        help="routed experts of the BF16 layout",
    )
    ap.add_argument(
        "--mtp-experts",
        choices=("fused", "split"),
        default="fused",
        help="3.6 releases: fused; 3.5: split",
    )
    ap.add_argument(
        "--fp32-gdn",
        action="store_true",
        help="A_log and the GDN norm in F32, as the 3.5 releases have them",
    )
    ap.add_argument(
        "--shard-bytes", type=float, help="payload limit of a shard (10e9; compressed-tensors 50e9)"
    )
    ap.add_argument(
        "--no-metadata",
        action="store_true",
        help="headers without __metadata__, as in the 27B release",
    )
    ap.add_argument("--list", action="store_true", help="print the tensors instead of the totals")
    ap.add_argument("--json", action="store_true", help="totals as JSON")
    ap.add_argument("--out", metavar="DIR", help="write the checkpoint directory")
    ap.add_argument("--data", choices=("sparse", "none"), default="sparse")
    ap.add_argument("--self-check", metavar="DIR")
    a = ap.parse_args()
    if a.self_check:
        return 1 if self_check(a.self_check) else 0
    if not a.config:
        ap.error("CONFIG is missing")
    try:
        cfg = load(a.config)
        quant = load(a.quant) if a.quant else cfg.get("quantization_config")
        quant = (quant or {}).get("quantization_config", quant)
        tensors = checkpoint(
            cfg,
            a.nvfp4_layout,
            quant,
            a.experts == "fused",
            a.mtp_experts == "fused",
            a.fp32_gdn,
            not a.no_input_scale,
            a.kv_scales,
        )
    except Refused as e:
        print(f"refused: {e}", file=sys.stderr)
        return 2
    limit = a.shard_bytes or (50e9 if a.nvfp4_layout == "compressed-tensors" else 10e9)
    parts = files(tensors, limit, a.nvfp4_layout, not a.no_metadata)
    if a.list:
        for name, shard, _ in parts:
            for n, dt, shape in shard:
                print("%s\t%s\t%s\t%d\t%s" % (n, dt, list(shape), size((n, dt, shape)), name))
        return 0
    sums = totals(tensors)
    sums["files"] = []
    for name, shard, metadata in parts:
        head, payload = header(shard, metadata)
        sums["files"].append(
            {"file": name, "tensors": len(shard), "header": len(head), "bytes": len(head) + payload}
        )
    sums["file_bytes"] = sum(f["bytes"] for f in sums["files"])
    if a.out:
        beside = os.path.join(os.path.dirname(os.path.abspath(a.config)), "hf_quant_config.json")
        write(a.out, parts, a.config, [beside] if a.nvfp4_layout == "modelopt" else [], a.data)
    if a.json:
        print(json.dumps(sums, indent=2))
        return 0
    print(
        "tensors %d  elements %d  bytes %d  files %d (with headers)"
        % (sums["tensors"], sums["elements"], sums["bytes"], sums["file_bytes"])
    )
    for k, n in sorted(sums["by_dtype"].items(), key=lambda kv: RANK[kv[0]]):
        print("  %-8s %15d elements %15d bytes" % (k, n, n * BYTES[k]))
    for f in sums["files"]:
        print("  %(file)s  %(bytes)d bytes, header %(header)d, %(tensors)d tensors" % f)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of --list has had enough
        os._exit(0)
