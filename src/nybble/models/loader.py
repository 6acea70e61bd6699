"""From a checkpoint folder to the parts of a network: packed weights stay where the file has them.

Any checkpoint that `checkpoint/` reads and whose family is known: BF16, ModelOpt, compressed-
tensors, experts in stacks or one by one, with either spelling of the language model's prefix.
Vectors (norms, biases, decays) become float32 tensors of their own; matrices are views of the map.
Weights in memory may be held in the place of the file's, by module: parts made meanwhile are those
of the checkpoint that has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nybble.check.contents import (
    CODES,
    INPUT_SCALES,
    KV_SCALES,
    SCALES,
    TENSOR_SCALES,
    Contents,
    Module,
    is_divisor,
    read_contents,
)
from nybble.checkpoint.dialects import declaration_of
from nybble.checkpoint.reader import Checkpoint
from nybble.checkpoint.safetensors import TensorInfo
from nybble.errors import ModelError
from nybble.families import find_family
from nybble.formats.block import FORMATS, FP8, FP8_BLOCK, FP8_CHANNEL, BlockFormat, Shape
from nybble.formats.scheme import FP8_BLOCK_DYNAMIC, FP8_DYNAMIC, FP8_STATIC, NVFP4_W4A4, Activation
from nybble.formats.tensor import BlockScaledTensor
from nybble.kernels.block_matmul import Weight, prepare
from nybble.kernels.expert_matmul import prepare_experts
from nybble.models import llama, qwen2, qwen3, qwen3_5, qwen3_5_moe, qwen3_moe
from nybble.models.attention import Attention
from nybble.models.delta import GatedDelta
from nybble.models.feed_forward import MLP, MixtureOfExperts
from nybble.models.layer import Layer
from nybble.models.linear import Experts, Linear
from nybble.models.mtp import MtpHead
from nybble.models.network import Architecture, Network, read_network
from nybble.plan.refusals import FLOATS

ARCHITECTURES: dict[str, Architecture] = {
    a.model_type: a
    for a in (
        qwen3_5_moe.ARCHITECTURE,
        qwen3_5.ARCHITECTURE,
        qwen3_moe.ARCHITECTURE,
        qwen3.ARCHITECTURE,
        qwen2.ARCHITECTURE,
        llama.ARCHITECTURE,
    )
}
#: All that a module may consist of to be computed; anything else would be ignored in silence.
_KNOWN_LEAVES = frozenset(
    (*CODES, *SCALES[:2], *TENSOR_SCALES, *INPUT_SCALES, *KV_SCALES, "bias", "weight_shape")
)
_ACTIVATIONS = {
    "FP4": NVFP4_W4A4.input,
    "FP8 static": FP8_STATIC.input,
    "FP8 dynamic": FP8_DYNAMIC.input,
}


@dataclass(frozen=True, slots=True)
class Held:
    """A weight [N, K] in memory, and how the input of its module is declared to be quantized."""

    weight: BlockScaledTensor
    activation: Activation | None = None
    input_scale: float | None = None


class Weights:
    """The weights of one checkpoint by the names that a network's parts have below the prefix."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Raises ModelError for an unknown or uncomputable model, CheckpointError for a file."""
        self.checkpoint = checkpoint
        if not checkpoint.config:
            raise ModelError(f"{checkpoint.path}: has no config.json; complete the download")
        self.family = find_family(checkpoint.config)
        self.network: Network = read_network(
            checkpoint.config, self.family, ARCHITECTURES[self.family.model_type]
        )
        self.prefix = self._find_prefix()
        self._held: dict[str, Held] = {}
        section = checkpoint.config.get("quantization_config")
        if isinstance(section, Mapping) and section.get("transform_config"):
            raise ModelError(
                f"{checkpoint.path}: config.json has a transform_config (rotations), which nybble "
                "does not compute; results would be wrong"
            )

    @cached_property
    def contents(self) -> Contents:
        """The modules of the checkpoint, as its configuration declares them."""
        return read_contents(self.checkpoint, declaration_of(self.checkpoint))

    def _find_prefix(self) -> str:
        tensors = self.checkpoint.tensors
        for prefix in self.family.prefixes:
            if any(f"{prefix}embed_tokens.{leaf}" in tensors for leaf in CODES):
                return prefix
        raise ModelError(
            f"{self.checkpoint.path}: no token embedding; expected one of "
            f"{', '.join(p + 'embed_tokens.weight' for p in self.family.prefixes)}"
        )

    def hold(self, module: str, held: Held) -> None:
        """Take this weight for the module's until `release`, in every part that is made meanwhile;
        its bias stays the file's. The arrays are used where they are."""
        self._held[module] = held

    def release(self) -> None:
        """Take the file's weights again."""
        self._held.clear()

    # --------------------------------------------------------------------------- single tensors

    def module(self, name: str) -> Module:
        """A module by its full name. Raises ModelError if there is none, or it is incomplete."""
        found = self.contents.by_name.get(name)
        if found is None:
            raise ModelError(
                f"{self.checkpoint.path}: no tensors of {name!r}, which config.json promises; the "
                "download or an earlier tool lost them"
            )
        if found.kind.problem:
            raise ModelError(f"{self.checkpoint.path}: {name}: {found.kind.problem}")
        for tensor in found.tensors:
            if found.kind.is_quantized and tensor.name[len(name) + 1 :] not in _KNOWN_LEAVES:
                raise ModelError(
                    f"{self.checkpoint.path}: {tensor.name}: nybble does not compute with this; "
                    "leaving it out would give other answers than an engine's"
                )
        return found

    def vector(self, name: str, shape: Shape) -> Tensor:
        """A small tensor of its own memory, float32, reshaped where only ones are dropped."""
        info = self.checkpoint.tensors.get(name)
        if info is None:
            raise ModelError(
                f"{self.checkpoint.path}: no tensor {name!r}, which config.json promises; the "
                "download or an earlier tool lost it"
            )
        if tuple(n for n in info.shape if n != 1) != tuple(n for n in shape if n != 1):
            raise ModelError(
                f"{self.checkpoint.path}: {name}: expected {list(shape)} from config.json, found "
                f"{list(info.shape)}"
            )
        if info.dtype not in FLOATS:
            raise ModelError(f"{self.checkpoint.path}: {name}: is {info.dtype}, expected a float")
        values = self.checkpoint.array(name).astype(np.float32).reshape(shape)
        return torch.from_numpy(np.ascontiguousarray(values))

    def bias(self, module: str, rows: int) -> NDArray[np.float32] | None:
        """The bias of a module, float32 [rows], None where it has none."""
        name = f"{module}.bias"
        if name not in self.checkpoint.tensors:
            return None
        return self.vector(name, (rows,)).numpy()

    def weight(self, name: str, shape: Shape) -> Weight:
        """The weight [N, K] of a module, in the format that its tensors have."""
        if name in self._held:
            return self._fitting(name, self._held[name].weight, shape)
        module = self.module(name)
        codes = module.tensor(*CODES)
        if codes is None:
            raise ModelError(f"{self.checkpoint.path}: {name} has no weight")
        if not module.kind.is_quantized:
            if codes.dtype not in FLOATS:
                raise ModelError(
                    f"{self.checkpoint.path}: {codes.name} is {codes.dtype}, expected a float"
                )
            weight: Weight = self.checkpoint.array(codes.name)
        else:
            weight = self._packed(module, codes, shape)
        return self._fitting(name, weight, shape)

    def _fitting(self, name: str, weight: Weight, shape: Shape) -> Weight:
        if tuple(weight.shape) != tuple(shape):
            raise ModelError(
                f"{self.checkpoint.path}: {name}: expected {list(shape)} from config.json, found "
                f"{list(weight.shape)}"
            )
        return weight

    def _packed(self, module: Module, codes: TensorInfo, shape: Shape) -> BlockScaledTensor:
        fmt = FORMATS.get(module.kind.held)
        scale = module.tensor(*SCALES[:2])
        if fmt is None or scale is None:
            raise ModelError(
                f"{self.checkpoint.path}: {module.name} is {module.kind.held}, which nybble does "
                f"not compute with; it runs {', '.join(FORMATS)} and plain floats"
            )
        raw = self.checkpoint.array(codes.name).view(np.uint8)
        full = (*raw.shape[:-1], raw.shape[-1] * (2 if fmt.is_packed else 1))
        tensor_scale = None
        if fmt.has_tensor_scale:
            tensor_scale = self._multiplier(module, *TENSOR_SCALES)
        return BlockScaledTensor(fmt, full, raw, self._block_scales(fmt, scale, full), tensor_scale)

    def _block_scales(self, fmt: BlockFormat, scale: TensorInfo, shape: Shape) -> NDArray:  # type: ignore[type-arg]
        stored = self.checkpoint.array(scale.name)
        if fmt in (FP8, FP8_CHANNEL, FP8_BLOCK):
            return stored.astype(np.float32).reshape(fmt.scale_shape(shape))
        return stored.view(np.uint8)

    def _multiplier(self, module: Module, *leaves: str) -> NDArray[np.float32] | None:
        """A scalar scale as what is multiplied with; divisors end here."""
        found = module.tensor(*leaves)
        if found is None:
            return None
        value = self.checkpoint.array(found.name).astype(np.float32).reshape(())
        if is_divisor(found):
            value = np.float32(1) / value
        return np.asarray(value, dtype=np.float32)

    def activation(self, name: str) -> Activation | None:
        """How the checkpoint declares the module's input to be quantized."""
        if name in self._held:
            return self._held[name].activation
        declared = self.module(name).declared
        if declared is None or declared.activation in ("", "BF16"):
            return None
        if declared.activation not in _ACTIVATIONS:
            raise ModelError(
                f"{self.checkpoint.path}: {name} is declared with inputs in "
                f"{declared.activation!r}, which nybble cannot simulate; it knows "
                f"{', '.join(_ACTIVATIONS)}"
            )
        if declared.activation == "FP8 dynamic" and declared.weight == FP8_BLOCK.name:
            return FP8_BLOCK_DYNAMIC.input
        return _ACTIVATIONS[declared.activation]

    def input_scale(self, name: str) -> float | None:
        """The stored scale of the module's input, as a multiplier."""
        if name in self._held:
            return self._held[name].input_scale
        found = self._multiplier(self.module(name), *INPUT_SCALES)
        return None if found is None else float(found)

    def kv_scales(self, layer: int) -> tuple[float, float]:
        """The scales of a layer's keys and values in FP8 pages, 1.0 where the checkpoint has none;
        layer -1 is the MTP head's. Raises ModelError for scales that cannot be meant."""
        base = f"{self._mtp_base}layers.0." if layer < 0 else f"{self.prefix}layers.{layer}."
        key, value = (
            self._kv_scale(
                f"{base}self_attn.{kind}_proj.{kind}_scale", f"{base}self_attn.{kind}_scale"
            )
            for kind in "kv"
        )
        if (key is None) != (value is None):
            raise ModelError(
                f"{self.checkpoint.path}: {base}self_attn has a scale for its "
                f"{'values' if key is None else 'keys'} in the KV cache and none for the other; "
                "an earlier tool lost it"
            )
        return key or 1.0, value or 1.0

    def _kv_scale(self, *names: str) -> float | None:
        """The one of these tensors that the checkpoint has: ModelOpt's, compressed-tensors'."""
        name = next((n for n in names if n in self.checkpoint.tensors), None)
        if name is None:
            return None
        value = float(self.vector(name, ()))
        if not 0 < value < float("inf"):
            raise ModelError(
                f"{self.checkpoint.path}: {name} is {value}, expected a positive finite scale"
            )
        return value

    @property
    def _mtp_base(self) -> str:
        return "model.mtp." if "model.mtp.fc.weight" in self.checkpoint.tensors else "mtp."

    # ------------------------------------------------------------------------------- the parts

    def linear(self, names: Sequence[str], rows: Sequence[int], k: int) -> Linear:
        """Modules [rows, k] with one input as one matmul. Raises ModelError if their declared
        activations differ."""
        weights = [self.weight(n, (r, k)) for n, r in zip(names, rows, strict=True)]
        biases = [self.bias(n, r) for n, r in zip(names, rows, strict=True)]
        activations = {self.activation(n) for n in names}
        if len(activations) > 1:
            raise ModelError(
                f"{self.checkpoint.path}: {', '.join(names)} share their input and declare it "
                "quantized differently; no engine runs that"
            )
        scales = [s for n in names if (s := self.input_scale(n)) is not None]
        return Linear(
            tuple(names),
            prepare(weights, biases, name=names[0]),
            activations.pop(),
            max(scales) if scales else None,
        )

    def experts(self, base: str, parts: Sequence[str], rows: int, k: int) -> Experts:
        """One projection [rows, k] of all experts, or several that share their input."""
        count = self.network.dims.experts
        names = tuple(tuple(f"{base}.{e}.{part}" for part in parts) for e in range(count))
        stack = f"{base}.{'gate_up_proj' if len(parts) == 2 else parts[0]}"
        held = sum(n in self._held for expert in names for n in expert)
        if held not in (0, count * len(parts)):
            lacking = next(n for expert in names for n in expert if n not in self._held)
            raise ModelError(
                f"{self.checkpoint.path}: {held} of {count * len(parts)} matrices of the experts "
                f"of {base} are held, {lacking} for one is not; hold all of a projection, or none"
            )
        if stack in self.checkpoint.tensors and not held:
            stacked = self.checkpoint.array(stack)
            expected = (count, rows * len(parts), k)
            if stacked.shape != expected:
                raise ModelError(
                    f"{self.checkpoint.path}: {stack}: expected {list(expected)} from config.json, "
                    f"found {list(stacked.shape)}"
                )
            return Experts(names, prepare_experts([[w] for w in stacked], name=stack))
        weights = [[self.weight(n, (rows, k)) for n in expert] for expert in names]
        activations = {self.activation(n) for expert in names for n in expert}
        if len(activations) > 1:
            raise ModelError(
                f"{self.checkpoint.path}: the experts of {base} declare their inputs quantized "
                "differently; engines run all alike"
            )
        activation = activations.pop()
        scales = None
        if activation is not None and activation.has_input_scale:
            found = [max(filter(None, map(self.input_scale, e)), default=None) for e in names]
            if None not in found:
                scales = torch.tensor(found, dtype=torch.float32)
        return Experts(names, prepare_experts(weights, name=base), activation, scales)

    def layer(self, number: int) -> Layer:
        """A decoder layer of the trunk."""
        dims = self.network.dims
        base = f"{self.prefix}layers.{number}."
        if self.network.is_linear(number):
            mixer: Attention | GatedDelta = self._gated_delta(f"{base}linear_attn.")
        else:
            window = self.network.layer_window(number)
            mixer = self._attention(f"{base}self_attn.", window)
        return self._layer(base, mixer, has_experts=dims.has_experts[number])

    def check(self) -> None:
        """Make every part of the network once, so that what is missing, misshapen or unknown is
        said before hours of work. Raises ModelError."""
        for number in range(self.network.dims.layers):
            self.layer(number)
        self.embedding()
        self.final_norm()
        self.head()

    def damaged(self, number: int) -> str:
        """The first tensor of a layer that holds NaN or infinity, "" if none does."""
        for name in self._by_layer.get(f"{self.prefix}layers.{number}.", ()):
            array = self.checkpoint.array(name)
            if array.dtype.kind in "iub":
                continue
            for at in range(0, array.size, 1 << 22):
                part = array.reshape(-1)[at : at + (1 << 22)].astype(np.float32)
                if not np.isfinite(part).all():
                    return name
        return ""

    def drop_layer(self, number: int) -> None:
        """Let the mapped pages of a layer's weights go; touched again, they are read again."""
        base = f"{self.prefix}layers.{number}."
        for name in self._by_layer.get(base, ()):
            self.checkpoint.drop_pages(name)

    @cached_property
    def _by_layer(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.checkpoint.tensors:
            if name.startswith(f"{self.prefix}layers."):
                end = name.index(".", len(self.prefix) + len("layers.")) + 1
                found.setdefault(name[:end], []).append(name)
        return found

    def _layer(self, base: str, mixer: Attention | GatedDelta, *, has_experts: bool) -> Layer:
        dims = self.network.dims
        feed = (
            self._mixture(f"{base}mlp.")
            if has_experts
            else self._mlp(f"{base}mlp.", dims.intermediate)
        )
        norms = [
            self.vector(f"{base}{name}.weight", (dims.hidden,))
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
        return Layer(base[:-1], self.network, mixer, feed, *norms)

    def _attention(self, base: str, window: int) -> Attention:
        d = self.network.dims
        query = d.heads * d.head_dim * (2 if d.attention_gate else 1)
        key = d.kv_heads * d.head_dim
        query_norm = key_norm = None
        if self.network.architecture.has_head_norms:
            query_norm, key_norm = (
                self.vector(f"{base}{n}.weight", (d.head_dim,)) for n in ("q_norm", "k_norm")
            )
        qkv = [f"{base}{n}_proj" for n in "qkv"]
        for name in qkv if self.network.architecture.qkv_bias or d.attention_bias else ():
            if f"{name}.bias" not in self.checkpoint.tensors:
                raise ModelError(f"{self.checkpoint.path}: no tensor {name + '.bias'!r}")
        return Attention(
            self.network,
            self.linear(qkv, (query, key, key), d.hidden),
            self.linear([f"{base}o_proj"], (d.hidden,), d.heads * d.head_dim),
            query_norm,
            key_norm,
            window,
        )

    def _gated_delta(self, base: str) -> GatedDelta:
        d = self.network.dims
        heads, value = d.linear_value_heads, d.linear_value_heads * d.linear_value_dim
        channels = 2 * d.linear_key_heads * d.linear_key_dim + value
        names = [f"{base}in_proj_{n}" for n in ("qkv", "z", "b", "a")]
        return GatedDelta(
            self.network,
            self.linear(names[:2], (channels, value), d.hidden),
            self.linear(names[2:], (heads, heads), d.hidden),
            self.linear([f"{base}out_proj"], (d.hidden,), value),
            self.vector(f"{base}conv1d.weight", (channels, d.conv_kernel)),
            self.vector(f"{base}A_log", (heads,)),
            self.vector(f"{base}dt_bias", (heads,)),
            self.vector(f"{base}norm.weight", (d.linear_value_dim,)),
        )

    def _mlp(self, base: str, width: int) -> MLP:
        hidden = self.network.dims.hidden
        return MLP(
            self.linear([f"{base}gate_proj", f"{base}up_proj"], (width, width), hidden),
            self.linear([f"{base}down_proj"], (hidden,), width),
        )

    def _mixture(self, base: str) -> MixtureOfExperts:
        d = self.network.dims
        experts = f"{base}experts"
        shared, gate = None, None
        if self.network.architecture.has_shared_expert:
            shared = self._mlp(f"{base}shared_expert.", d.shared_width)
            gate = self.linear([f"{base}shared_expert_gate"], (1,), d.hidden)
        return MixtureOfExperts(
            self.linear([f"{base}gate"], (d.experts,), d.hidden),
            self.experts(experts, ("gate_proj", "up_proj"), d.expert_width, d.hidden),
            self.experts(experts, ("down_proj",), d.hidden, d.expert_width),
            d.experts_per_token,
            self.network.normalises_experts,
            shared,
            gate,
        )

    def embedding(self) -> NDArray[np.generic]:
        """The token embedding [V, H], a view of the map. Raises ModelError if it is quantized."""
        dims = self.network.dims
        weight = self.weight(f"{self.prefix}embed_tokens", (dims.vocab, dims.hidden))
        if isinstance(weight, BlockScaledTensor):
            raise ModelError(f"{self.prefix}embed_tokens is quantized; look-ups need plain rows")
        return weight

    def final_norm(self) -> Tensor:
        """The norm after the last layer, float32 [H]."""
        return self.vector(f"{self.prefix}norm.weight", (self.network.dims.hidden,))

    def head(self) -> Linear:
        """The output head, [V, H]; that of a tied model is its embedding."""
        dims = self.network.dims
        name = f"{self.prefix}embed_tokens" if dims.tied else "lm_head"
        return self.linear([name], (dims.vocab,), dims.hidden)

    def mtp(self) -> MtpHead | None:
        """The MTP head, None where config.json promises none. Raises ModelError for one that is
        promised and absent, and for several layers."""
        d = self.network.dims
        if d.mtp_layers == 0:
            return None
        if d.mtp_layers > 1:
            raise ModelError(f"config.json: {d.mtp_layers} MTP layers; one is implemented")
        base = self._mtp_base
        names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        embedding, hidden, final = (self.vector(f"{base}{n}.weight", (d.hidden,)) for n in names)
        layer = f"{base}layers.0."
        mixer = replace(self._attention(f"{layer}self_attn.", 0), first=1)
        return MtpHead(
            self.network,
            self.linear([f"{base}fc"], (d.hidden,), 2 * d.hidden),
            embedding,
            hidden,
            self._layer(layer, mixer, has_experts=d.experts > 0),
            final,
        )
