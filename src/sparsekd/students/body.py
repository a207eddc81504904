"""What every student's transformer needs: a tokenizer of its own, the layers asked for, positions for every token.

transformers makes a tokenizer of five tokens for a folder that holds none, and starts missing weights at random; here both are
refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekd.model_reference import num_positions
from sparsekd.recipe import Student

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")
_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "embedding_dropout",  # from here ModernBERT's
    "mlp_dropout",
)


def config_changes(student: Student, folder: Path) -> dict[str, Any]:
    """Return what the recipe changes in the config of ``folder``: {name: value}, by the architecture's own names.

    Raises ValueError if the recipe asks for more layers than there are.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    changes: dict[str, Any] = {}
    if student.num_layers is not None:
        if student.num_layers > config.num_hidden_layers:
            raise ValueError(
                f"[student] num_layers = {student.num_layers}: {student.model} has {config.num_hidden_layers}; ask for at most that"
            )
        changes["num_hidden_layers"] = student.num_layers
        if getattr(config, "layer_types", None):  # ModernBERT's: one entry a layer
            changes["layer_types"] = config.layer_types[: student.num_layers]
    # A frozen body's vectors are what the autoencoder has to give back: noise in them would teach it noise.
    dropout = 0.0 if student.freeze_body and student.dropout is None else student.dropout
    if dropout is not None:
        changes |= {name: dropout for name in _DROPOUTS if hasattr(config, name)}
    return changes


def changed_config(student: Student, folder: Path) -> PretrainedConfig:
    """Return the config of ``folder`` with the recipe's changes."""
    from transformers import AutoConfig

    config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for name, value in config_changes(student, folder).items():
        setattr(config, name, value)
    return config


def load_tokenizer(student: Student, folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer in ``folder``; ValueError if it holds none."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ValueError(
            f"[student] {student.model}: no tokenizer in it (none of {', '.join(_TOKENIZER_FILES)}); "
            "save the tokenizer it was trained with beside its weights"
        )
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer


def check_vocabulary(student: Student, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise ValueError if the tokenizer gives ids for which the model has no embedding."""
    last, rows = max(tokenizer.get_vocab().values()), model.config.vocab_size
    if last >= rows:
        raise ValueError(
            f"[student] {student.model}: its tokenizer gives ids up to {last}, its embeddings have {rows} rows; "
            "expected the tokenizer that the weights were trained with"
        )


def check_missing(student: Student, missing: list[str]) -> None:
    """Raise ValueError if weights are missing that would start at random."""
    if missing:
        raise ValueError(f"[student] {student.model}: weights lack {missing[:3]}; the student would start random")


def check_positions(student: Student, model: PreTrainedModel) -> None:
    """Raise ValueError if the model has fewer positions than the recipe's texts may have tokens."""
    limit = num_positions(model)
    if limit is not None and student.max_length > limit:
        raise ValueError(f"[student] max_length = {student.max_length}: {student.model} has {limit} positions; lower it")
