"""The rule that holds config.json against the source's (NB121): sizes and constants that decide
what the network computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nybble.check.completeness_source import head_of_tied, is_untied
from nybble.check.rule import Finding, Rule, Severity
from nybble.check.survey import CONFIG, Survey
from nybble.check.wording import first_of, plural
from nybble.checkpoint.safetensors import show
from nybble.families.dimensions import TIED

#: Keys, at any depth, that change what is computed, or what is loaded. Others (versions, paths,
#: training constants, the quantization itself) may differ between a model and its copy.
_COMPUTED = frozenset(
    (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "layer_types"),
        *("rope_theta", "rope_type", "partial_rotary_factor", "mrope_section", "factor"),
        *("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
        *("low_freq_factor", "high_freq_factor", "mrope_interleaved", "sliding_window"),
        *("rms_norm_eps", "layer_norm_eps", TIED, "attention_bias", "mlp_bias"),
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
        *("shared_expert_intermediate_size", "decoder_sparse_step", "mlp_only_layers"),
        *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"),
        *("linear_value_head_dim", "linear_conv_kernel_dim", "attn_output_gate"),
        *("full_attention_interval", "mtp_num_hidden_layers", "depth", "patch_size"),
        *("spatial_merge_size", "temporal_patch_size", "num_heads", "out_hidden_size"),
        *("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
    )
)


def _differences(survey: Survey) -> Iterator[Finding]:
    source = survey.source
    if source is None or not survey.config or not source.config:
        return
    mine, theirs = dict(_flat(survey.config)), dict(_flat(source.config))
    changed = [
        f"{key}: {show(theirs[key])} became {show(mine[key])}"
        for key in theirs
        # What an exporter leaves out or adds are defaults, as a rule.
        if key in mine
        and mine[key] != theirs[key]
        and key.rpartition(".")[2] in _COMPUTED
        # What such a head holds is held against the embedding.
        and not (key.rpartition(".")[2] == TIED and _has_head_of_its_own(survey, source))
    ]
    if changed:
        yield CONFIG_DIFFERS.finding(
            f"{plural(len(changed), 'setting')} of the network not as the source has it, "
            f"{first_of(changed, len(changed))}",
            changed,
            file=CONFIG,
        )


def _has_head_of_its_own(survey: Survey, source: Survey) -> bool:
    """A tied source became an untied checkpoint, and the head is there."""
    heads = (m for m in survey.modules if m.role == "lm_head")
    return is_untied(survey) and any(head_of_tied(source, f"{m.name}.weight") for m in heads)


def _flat(config: Mapping[str, object], at: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if key in ("quantization_config", "compression_config"):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


CONFIG_DIFFERS = Rule(
    "NB121",
    "config-differs-from-source",
    Severity.ERROR,
    "config.json says another network than the source's",
    "Sizes, rotary base, norm epsilon, experts per token or the window of attention were edited or "
    "lost: everything loads, and the network computes something else. Only keys that both files "
    "have are compared, and only those that decide what is computed. A tied model may have got an "
    "output head of its own, which is then held against the embedding.",
    "Take the values of the source, or `nybble repair --source`.",
    _differences,
    is_repairable=True,
    needs=frozenset({"source"}),
)

RULES: tuple[Rule, ...] = (CONFIG_DIFFERS,)
