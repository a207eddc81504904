"""From rows to the features of each text column, with token ids that were made before training.

Equal to what sentence-transformers' collator makes of the same texts, prompts and routes included; packed without padding where the
column's transformer can (``packed_body``). A column whose route has no transformer stays text until here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers.sparse_encoder.data_collator import SparseEncoderDataCollator

from sparsekd.packed_body import flat_features
from sparsekd.students.routes import DOCUMENT, QUERY, modules_by_side
from sparsekd.training.rows import ID_COLUMN, LABEL_COLUMN
from sparsekd.training.tokens import TokenizedTexts, tokenized_texts

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sentence_transformer.modules import Transformer

_ROWS_READ = 256


@dataclass(frozen=True)
class TokenColumn:
    """Where a column's token ids are, and which transformer takes them under which prompt."""

    transformer: Transformer
    texts: TokenizedTexts
    prompt: str

    def features(self, texts: Sequence[str]) -> dict[str, Any]:
        """Return what ``transformer.preprocess`` gives for ``texts``, on the CPU."""
        ids = self.texts.ids(texts, self.prompt)
        if self.transformer.can_flatten_inputs:
            features = flat_features([row.tolist() for row in ids], self.transformer)
        else:
            features = padded_features(ids, self.transformer)
        if self.prompt:
            features["prompt_length"] = self.transformer._get_prompt_length(self.prompt)  # which it remembers
        return features


@dataclass
class RowCollator(SparseEncoderDataCollator):
    """Makes a batch of rows; carries the query ids along as strings under ``query_id``, and the label as float32."""

    tokens: Mapping[str, TokenColumn] = field(default_factory=dict, repr=False)
    """By text column; a column that is not here is preprocessed as text."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch: ``COLUMN_input_ids`` ... by column in the rows' order, ``label`` where there is one, ``query_id``."""
        batch: dict[str, Any] = {}
        for column in text_columns_of(features[0]):
            texts = [row[column] for row in features]
            route = self._resolve_router_mapping({}).get(column)
            if column in self.tokens:
                made = self.tokens[column].features(texts)
            else:
                prompt = self._get_prompt_for_column(self._resolve_prompts({}) or {}, column)
                made = self.preprocess_fn(texts, prompt=prompt, task=route)
            batch |= {f"{column}_{name}": value for name, value in made.items()}
            if route is not None:
                batch[f"{column}_task"] = route
        if LABEL_COLUMN in features[0]:
            labels = [row[LABEL_COLUMN] for row in features]
            is_tensor = isinstance(labels[0], torch.Tensor)
            batch[LABEL_COLUMN] = torch.stack(labels).float() if is_tensor else torch.from_numpy(np.asarray(labels, np.float32))
        batch[ID_COLUMN] = [row[ID_COLUMN] for row in features]
        return batch

    def token_sets(self) -> list[TokenizedTexts]:
        """Return the distinct sets of token ids behind the columns."""
        return list({id(column.texts): column.texts for column in self.tokens.values()}.values())

    def num_tokens(self, row: Mapping[str, Any]) -> int:
        """Return the tokens of a row's text columns; those without a transformer count none."""
        return sum(len(column.texts.ids([row[name]], column.prompt)[0]) for name, column in self.tokens.items())


def text_columns_of(row: Mapping[str, Any]) -> list[str]:
    """Return a row's text columns in their order: all but label and id."""
    return [column for column in row if column not in (LABEL_COLUMN, ID_COLUMN)]


def padded_features(token_ids: Sequence[NDArray[np.int32]], transformer: Transformer) -> dict[str, Any]:
    """Return the padded features of texts given as token ids: input_ids, attention_mask and what else the tokenizer makes."""
    tokenizer: Any = transformer.tokenizer
    width, shape = max(len(ids) for ids in token_ids), (len(token_ids), max(len(ids) for ids in token_ids))
    input_ids = np.full(shape, tokenizer.pad_token_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    for row, ids in enumerate(token_ids):
        place = slice(width - len(ids), width) if tokenizer.padding_side == "left" else slice(0, len(ids))
        input_ids[row, place], mask[row, place] = ids, 1
    types = np.full(shape, 0, dtype=np.int64)
    types[mask == 0] = tokenizer.pad_token_type_id
    arrays = {"input_ids": input_ids, "token_type_ids": types, "attention_mask": mask}
    names = ["input_ids", *(name for name in tokenizer.model_input_names if name != "input_ids")]
    return {**{name: torch.from_numpy(arrays[name]) for name in names if name in arrays}, "modality": "text"}


def token_columns(
    model: SparseEncoder,
    rows: Dataset,
    columns: Sequence[str],
    *,
    prompts: Mapping[str, str],
    routes: Mapping[str, str],
    cache: Path,
) -> dict[str, TokenColumn]:
    """Find or make the token ids of every column whose route begins with a transformer, by column. One pass over the rows."""
    from sentence_transformers.base.modules import Transformer

    sides = modules_by_side(model)
    first_by_column = {column: sides[QUERY if routes.get(column) == QUERY else DOCUMENT][0] for column in columns}
    transformers = {column: module for column, module in first_by_column.items() if isinstance(module, Transformer)}
    texts_by_column: dict[str, dict[str, None]] = {column: {} for column in transformers}
    for batch in rows.iter(batch_size=_ROWS_READ):
        for column, texts in texts_by_column.items():
            texts.update(dict.fromkeys(batch[column]))
    tokenized: dict[int, TokenizedTexts] = {}
    for transformer in {id(module): module for module in transformers.values()}.values():
        by_prompt: dict[str, dict[str, None]] = {}
        for column, module in transformers.items():
            if module is transformer:
                by_prompt.setdefault(prompts.get(column, ""), {}).update(texts_by_column[column])
        tokenized[id(transformer)] = tokenized_texts(transformer, by_prompt, cache=cache)
    return {column: TokenColumn(module, tokenized[id(module)], prompts.get(column, "")) for column, module in transformers.items()}
