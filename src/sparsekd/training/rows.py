"""Rows for the trainer: the score table memory-mapped, ids joined to texts when a batch is read.

Columns in the order that sentence-transformers takes as the contract: query, positive, negative_1 ... negative_M, label, and
``query_id``, which the collator takes out again so that an error can name the rows it met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sparsekd.collection.beir import Collection
from sparsekd.labels.score_table import ScoreTable

if TYPE_CHECKING:
    from datasets import Dataset

ID_COLUMN = "query_id"


def text_columns(num_passages: int) -> list[str]:
    """Return the names of the text columns.

    >>> text_columns(3)
    ['query', 'positive', 'negative_1', 'negative_2']
    """
    return ["query", "positive", *(f"negative_{number}" for number in range(1, num_passages))]


def training_rows(table: ScoreTable, collection: Collection) -> Dataset:
    """Return the table as a dataset whose batches hold texts and labels.

    Raises ValueError naming the first id that the collection does not have: then the table is of another collection.
    """
    from datasets import Dataset, concatenate_datasets

    for query_id, passage_ids, _ in table.rows():
        unknown = [passage_id for passage_id in passage_ids if passage_id not in collection.passages]
        if query_id not in collection.queries or unknown:
            what = f"passage {unknown[0]!r}" if unknown else f"query {query_id!r}"
            raise ValueError(
                f"{table.artifact.folder}: {what} is not in the collection; rebuild the table with make teacher-scores"
            )
    rows = concatenate_datasets([Dataset.from_file(str(path)) for path in table.shard_paths])
    rows.set_transform(_join(collection.queries, collection.passages, table.label_column, text_columns(table.num_passages)))
    return rows


def _join(
    queries: Mapping[str, str], passages: Mapping[str, str], label_column: str, columns: list[str]
) -> Callable[[dict[str, list[Any]]], dict[str, list[Any]]]:
    def join(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [[queries[query_id] for query_id in batch[ID_COLUMN]]]
        texts += [[passages[passage_id] for passage_id in column] for column in zip(*batch["passage_ids"], strict=True)]
        return {**dict(zip(columns, texts, strict=True)), "label": batch[label_column], ID_COLUMN: batch[ID_COLUMN]}

    return join
