"""A tied checkpoint seen as an untied one: the output head is a tensor of its own, whose bytes are
the embedding's.

A tied model looks tokens up in the matrix that it ends with. The look-up needs plain rows and
touches one of them; the head reads all of them with every token, in BF16, which is a quarter to a
half of what a small model reads at four bits. With a head of its own that half becomes codes, and
the embedding stays as it is: the folder grows by the head's codes.
"""

from __future__ import annotations

from collections.abc import Mapping

from nybble.checkpoint.reader import Checkpoint
from nybble.errors import ModelError
from nybble.families import Claimed, find_family
from nybble.families.dimensions import TIED

HEAD = "lm_head.weight"


def untied(checkpoint: Checkpoint) -> Checkpoint:
    """The same files with the head `lm_head.weight`, and a configuration that does not tie it.

    Raises ModelError for an unknown model type, a model whose head is not tied and a head that lies
    in the files already. Planning refuses recipes that would leave such a head as it is.
    """
    where = checkpoint.path
    if not checkpoint.config:
        raise ModelError(f"{where}: has no config.json; complete the download")
    family = find_family(checkpoint.config)
    if not family.dimensions(checkpoint.config).tied:
        raise ModelError(
            f"{where}: config.json does not tie the output head to the embedding, so there is "
            "nothing to untie; leave --untie-head out"
        )
    if HEAD in checkpoint.tensors:
        raise ModelError(
            f"{where}: the model is tied, and yet the files hold {HEAD}, which readers leave "
            "aside; remove that tensor, or correct tie_word_embeddings in config.json"
        )
    names = [n for n in checkpoint.tensors if _is_embedding(family.claim(n))]
    if len(names) != 1:
        raise ModelError(
            f"{where}: expected one token embedding, found {len(names)}"
            f"{': ' + ', '.join(names[:3]) if names else ''}"
        )
    return checkpoint.with_alias(HEAD, names[0], _untied_config(checkpoint.config))


def _is_embedding(claimed: Claimed | None) -> bool:
    return claimed is not None and claimed.claim.role == "embedding"


def _untied_config(config: Mapping[str, object]) -> dict[str, object]:
    """Every key that ties, at whatever depth it stands, says the opposite; one stands at the top,
    where transformers and the engines look."""
    found = {key: False if key == TIED else _untied_section(value) for key, value in config.items()}
    found[TIED] = False
    return found


def _untied_section(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    return {k: False if k == TIED else _untied_section(v) for k, v in value.items()}
