"""From a body to a cross-encoder with one logit, and its forward pass in groups of pairs of near-equal length."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekd.model_reference import num_positions, resolve
from sparsekd.recipe import TrainTeacher
from sparsekd.teachers.batching import forward_tokens, length_batches

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

logger = logging.getLogger(__name__)

_GROUP_TOKENS = 8192  # no setting: groups decide which numbers dropout draws, and [run] changes no bytes


def build_cross_encoder(section: TrainTeacher, device: str) -> CrossEncoder:
    """Return the section's body under a head with one logit and no activation; a head that the body lacks is drawn from the seed.

    Raises ValueError if the body is no encoder, lacks weights of its own, has a head of another width, has no positions for
    ``max_length`` tokens, or a tokenizer that has no template for pairs.
    """
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from transformers import set_seed

    folder = _checkpoint(resolve(section.model).path)
    drawn = _check_weights(section, folder)
    set_seed(section.seed)
    transformer = Transformer(
        str(folder),
        transformer_task="sequence-classification",
        model_kwargs={"dtype": torch.float32, "local_files_only": True},
        processor_kwargs={"model_max_length": section.max_length, "local_files_only": True},
        config_kwargs={"num_labels": 1, "local_files_only": True},
    )
    model: CrossEncoder = CrossEncoder(modules=[transformer], activation_fn=torch.nn.Identity(), device=device)
    positions = num_positions(transformer.model)
    if positions is not None and section.max_length > positions:
        raise ValueError(f"[train_teacher] max_length = {section.max_length}: {section.model} has {positions} positions; lower it")
    special = {pair: model.tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True)}
    if special[True] <= special[False]:
        raise ValueError(
            f"[train_teacher] model = {section.model!r}: its tokenizer puts nothing between the texts of a pair; "
            "expected one with a template for pairs"
        )
    if drawn:
        logger.info("train-teacher: %s drawn at random with seed %d, to be trained", ", ".join(drawn), section.seed)
    return model


@contextlib.contextmanager
def grouped_by_length(model: CrossEncoder) -> Iterator[None]:
    """Let ``model`` run a padded batch in groups of near-equal length, each without the columns that are padding to all of it.

    Scores come in the order of the batch and are the plain model's up to float rounding; dropout draws other numbers.
    """
    plain: Any = model.forward

    def forward(input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        is_token = input["attention_mask"].bool()
        groups = list(length_batches(is_token.sum(dim=1).cpu().numpy(), forward_tokens(_GROUP_TOKENS, model.device.type)))
        scores = []
        for group in groups:
            places = torch.from_numpy(group).to(is_token.device)
            columns = is_token[places].any(dim=0)
            part = {name: value[places][:, columns] if isinstance(value, Tensor) else value for name, value in input.items()}
            scores.append(plain(part, **kwargs)["scores"])
        order = torch.cat([torch.from_numpy(group) for group in groups]).to(is_token.device)
        return {**input, "scores": torch.cat(scores)[torch.argsort(order)]}

    model.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.forward


def num_cut(model: CrossEncoder, section: TrainTeacher, columns: dict[str, Any]) -> tuple[int, int]:
    """Return how many of the rows' pairs lose the end of a text at ``max_length``, and how many pairs there are."""
    special = model.tokenizer.num_special_tokens_to_add(pair=True)
    queries, passages = list(dict.fromkeys(columns["query"])), list(dict.fromkeys(chain.from_iterable(columns["passages"])))
    tokens = {text: length for texts in (queries, passages) for text, length in zip(texts, _lengths(model, texts), strict=True)}
    rows = zip(columns["query"], columns["passages"], strict=True)
    lengths = [tokens[query] + tokens[passage] + special for query, texts in rows for passage in texts]
    return sum(length > section.max_length for length in lengths), len(lengths)


def _lengths(model: CrossEncoder, texts: list[str]) -> list[int]:
    encoded = model.tokenizer(texts, add_special_tokens=False, truncation=False, return_attention_mask=False, verbose=False)
    return [len(ids) for ids in encoded["input_ids"]]


def _checkpoint(folder: Path) -> Path:
    """Return where the transformer of a folder lies: a sentence-transformers folder lists it first."""
    listed = folder / "modules.json"
    modules = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else [{"path": ""}]
    return folder / str(modules[0]["path"])


def _check_weights(section: TrainTeacher, folder: Path) -> list[str]:
    """Return the names of the weights of the head that the checkpoint lacks, reading names and shapes only."""
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    # Encoders are what transformers has a masked-LM head for; a decoder would read the passage without the words after it.
    heads = (AutoModelForMaskedLM, AutoModelForSequenceClassification)
    is_encoder = all(type(config) in head._model_mapping for head in heads) and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or not is_encoder:
        raise ValueError(
            f"[train_teacher] model = {section.model!r} is a {config.model_type} model ({', '.join(config.architectures or [])}); "
            "expected an encoder that transformers can put a sequence-classification head on"
        )
    model, report = AutoModelForSequenceClassification.from_pretrained(
        str(folder),
        num_labels=1,
        device_map="meta",  # allocates nothing
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        local_files_only=True,
    )
    if report["mismatched_keys"]:
        found = ", ".join(sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"]))
        raise ValueError(
            f"[train_teacher] model = {section.model!r}: {found} have other shapes than with one label; "
            "expected an encoder, or a cross-encoder with one label"
        )
    missing = sorted(report["missing_keys"])
    body = [name for name in missing if name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name]
    if body:
        raise ValueError(
            f"[train_teacher] model = {section.model!r}: {folder} lacks {len(body)} weights of its body ({', '.join(body[:3])}), "
            "which would be drawn at random; expected a whole encoder"
        )
    return missing
