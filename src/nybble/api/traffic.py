"""What one step of a model has to read and to multiply, from the headers of its checkpoint: the
roofs that measured speeds are compared with.

Counted are the weights of linears as they are stored, scales included, the pages of keys and values
and the recurrent states. Not counted: norms' arithmetic, attention's products, activations, which
stay in caches. So a roof is never too low. Which experts tokens choose is not known beforehand:
expected is what independent uniform choices give.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from nybble.check.contents import Module, is_four_bit, read_contents
from nybble.checkpoint.dialects import declaration_of
from nybble.checkpoint.reader import Checkpoint
from nybble.errors import ModelError
from nybble.families import Dimensions, find_family
from nybble.families.dimensions import LINEAR
from nybble.kernels.machine_limits import Limits

#: Roles whose weights a matmul reads at every step.
_DENSE = (
    *("mlp", "attention", "linear_attention", "linear_attention_gate"),
    *("router", "shared_expert", "shared_expert_gate"),
)
_ALWAYS_READ = ("norm", "bias", "linear_attention_state")


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of some linears: bytes as stored, and parameters with four bits and with more."""

    nbytes: int = 0
    four_bit: int = 0
    wide: int = 0

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.four_bit + self.wide


@dataclass(frozen=True, slots=True)
class Traffic:
    """Sizes of one model. `routed` are all experts of all layers, of which a token takes `top` of
    `experts` in each; `head` is what logits read; `embedding_bytes` one row of the embedding.
    `page_elements` are keys and values of one token; `state_bytes` the recurrent states of a
    sequence, float32."""

    dims: Dimensions
    dense: Weights
    routed: Weights
    head: Weights
    embedding_bytes: int
    page_elements: int
    state_bytes: int
    stored_bytes: int
    parameters: int
    formats: tuple[str, ...]  # of the linears, those with more parameters first

    def experts_share(self, tokens: int) -> float:
        """The expected share of a layer's experts that at least one of `tokens` chooses."""
        if not self.routed.parameters:
            return 0.0
        return float(1 - (1 - self.dims.experts_per_token / self.dims.experts) ** tokens)

    def weight_bytes(self, tokens: int, outputs: int) -> float:
        """Bytes of weights that a step of `tokens`, with logits for `outputs`, reads."""
        head = self.head.nbytes if outputs else 0
        rows = tokens * self.embedding_bytes
        return self.dense.nbytes + self.experts_share(tokens) * self.routed.nbytes + head + rows

    def state_traffic(self, context: float, page_width: int) -> float:
        """Bytes of one sequence's state that a token of decoding reads or writes: `context` tokens
        of pages with elements of `page_width` bytes, and the recurrent states both ways."""
        return context * self.page_elements * page_width + 2 * self.state_bytes

    def compute_seconds(self, tokens: int, outputs: int, limits: Limits, precision: str) -> float:
        """The least time that the multiply-adds of linears take at the machine's peaks."""
        share = self.dims.experts_per_token / self.dims.experts if self.routed.parameters else 0.0
        found = 0.0
        for weights, rows in (
            (self.dense, float(tokens)),
            (self.routed, tokens * share),
            (self.head, float(outputs)),
        ):
            for parameters, is_packed in ((weights.four_bit, True), (weights.wide, False)):
                kind = operand(precision, limits.operations_s, is_four_bit=is_packed)
                found += 2 * parameters * rows / limits.operations_s[kind]
        return found


def operand(precision: str, peaks: Mapping[str, float], *, is_four_bit: bool = True) -> str:
    """The type of operands that a matmul multiplies on this machine: INT8 is for four-bit weights
    alone, and BF16 operands become FP32 where there is no instruction for them."""
    if precision == "int8" and is_four_bit and "int8" in peaks:
        return "int8"
    return "bf16" if precision != "f32" and "bf16" in peaks else "f32"


def read_traffic(checkpoint: Checkpoint) -> Traffic:
    """The sizes of a checkpoint. Raises ModelError for a model whose roles are not known."""
    family = find_family(checkpoint.config)
    dims = family.dimensions(checkpoint.config)
    contents = read_contents(checkpoint, declaration_of(checkpoint))
    by_role: dict[str, list[Module]] = {}
    for module in contents.modules:
        by_role.setdefault(module.role, []).append(module)
    embedding = by_role.get("embedding", [])
    if not dims.layers or not embedding:
        raise ModelError(f"{checkpoint.path}: {contents.why_no_roles or 'no token embedding'}")
    dense = [m for role in _DENSE for m in by_role.get(role, ())]
    small = sum(m.kind.nbytes for role in _ALWAYS_READ for m in by_role.get(role, ()))
    routed, head = by_role.get("routed_expert", []), by_role.get("lm_head") or embedding
    counted = _weights(dense)
    return Traffic(
        dims,
        Weights(counted.nbytes + small, counted.four_bit, counted.wide),
        _weights(routed),
        _weights(head),
        embedding[0].kind.nbytes // dims.vocab,
        _page_elements(dims),
        _state_bytes(dims),
        sum(m.kind.nbytes for m in contents.modules),
        sum(m.kind.parameters for m in contents.modules),
        _formats([*dense, *routed]),
    )


def _weights(modules: list[Module]) -> Weights:
    packed = sum(m.kind.parameters for m in modules if is_four_bit(m))
    every = sum(m.kind.parameters for m in modules)
    return Weights(sum(m.kind.nbytes for m in modules), packed, every - packed)


def _formats(modules: list[Module]) -> tuple[str, ...]:
    """Those that hold at least a hundredth of the parameters."""
    counted: Counter[str] = Counter()
    for module in modules:
        counted[module.kind.held] += module.kind.parameters
    return tuple(f for f, n in counted.most_common() if 100 * n >= counted.total())


def _page_elements(dims: Dimensions) -> int:
    """Layers with a sliding window are counted in full: within the window they read as much."""
    layers = sum(kind != LINEAR for kind in dims.layer_types)
    return 2 * layers * dims.kv_heads * dims.head_dim


def _state_bytes(dims: Dimensions) -> int:
    layers = sum(kind == LINEAR for kind in dims.layer_types)
    value = dims.linear_value_heads * dims.linear_value_dim
    channels = 2 * dims.linear_key_heads * dims.linear_key_dim + value
    return 4 * layers * (value * dims.linear_key_dim + (dims.conv_kernel - 1) * channels)
