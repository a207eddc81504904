"""Rows for the trainer: the score table memory-mapped, ids joined to texts when a batch is read.

Columns in the order that sentence-transformers takes as the contract: the text columns of the table's kind, ``label`` where the
kind has one, and ``query_id``, which the collator takes out again so that an error can name the rows it met. No text column's
name with ``_`` begins another's: sentence-transformers finds a column's features by that beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sparsekd.collection.beir import Collection
from sparsekd.labels.contract import Kind, Role
from sparsekd.labels.score_table import ScoreTable
from sparsekd.labels.vectors import vocabulary_digest

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SparseEncoder

ID_COLUMN = "query_id"
LABEL_COLUMN = "label"

_Batch = dict[str, Any]


def text_columns(kind: Kind, num_passages: int) -> list[str]:
    """Return the names of a kind's text columns, in order.

    >>> text_columns("score_list", 3)
    ['query', 'positive', 'negative_1', 'negative_2']
    >>> text_columns("similarity", 1), text_columns("embedding", 0)
    (['sentence_A', 'sentence_B'], ['sentence'])
    """
    if kind == "similarity":
        return ["sentence_A", "sentence_B"]
    if kind == "embedding":
        return ["sentence"]
    return ["query", "positive", *(f"negative_{number}" for number in range(1, num_passages))]


def training_rows(table: ScoreTable, collection: Collection, label_scale: float = 1.0) -> Dataset:
    """Return the table as a dataset whose batches hold texts and labels, score lists and margins times ``label_scale``.

    Labels are lists of float for score_list and margin, float for similarity, float32 [V] tensors for embedding, made dense when
    a batch is read; ``query_id`` of an embedding row is its role and id. Raises ValueError naming the first id that the
    collection does not have: then the table is of another collection.
    """
    from datasets import Dataset, concatenate_datasets

    texts: dict[Role, Mapping[str, str]] = {"query": collection.queries, "passage": collection.passages}
    for role, ids in table.texts().items():
        unknown = next((text_id for text_id in ids if text_id not in texts[role]), None)
        if unknown is not None:
            raise ValueError(
                f"{table.artifact.folder}: {role} {unknown!r} is not in the collection; rebuild the table with make teacher-scores"
            )
    rows = concatenate_datasets([Dataset.from_file(str(path)) for path in table.shard_paths])
    if table.kind == "embedding":
        rows.set_transform(_join_texts(texts, int(table.contract.dimension or 0)))
    else:
        columns = text_columns(table.kind, table.num_passages)
        rows.set_transform(_join_rows(texts, table.label_column, columns, label_scale))
    return rows


def check_vector_space(table: ScoreTable, model: SparseEncoder) -> None:
    """Raise ValueError, naming both sides, unless the vectors of an embedding table live in the student's space.

    Its width must be the student's, and where dims are terms on both sides every dim the same term. Other kinds pass.
    """
    if table.kind != "embedding":
        return
    ours = model.get_embedding_dimension()
    if table.contract.dimension != ours:
        raise ValueError(
            f"{table.artifact.folder}: the teacher's vectors have {table.contract.dimension} dims, the student's have {ours}; "
            "choose a student of the teacher's vocabulary, or [labels] of another kind"
        )
    if table.contract.vocabulary is not None and dims_are_terms(model):
        check_vocabulary(table.contract.vocabulary, model, f"the teacher of {table.artifact.folder}")


def check_vocabulary(teacher_digest: str, model: SparseEncoder, teacher: str) -> None:
    """Raise ValueError unless the student's terms are the teacher's, in the same order; for students whose dims are terms."""
    if not dims_are_terms(model):
        return
    ours = vocabulary_digest(tokenizer_of(model).get_vocab())
    if teacher_digest != ours:
        raise ValueError(
            f"the vocabulary of {teacher} ({teacher_digest[:12]}) is not the student's ({ours[:12]}): the same dim would mean "
            "another term; choose a student with the teacher's tokenizer, or [labels] of another kind"
        )


def _join_rows(
    texts: Mapping[Role, Mapping[str, str]], label_column: str | None, columns: list[str], label_scale: float
) -> Callable[[_Batch], _Batch]:
    def join(batch: _Batch) -> _Batch:
        parts = [[texts["query"][query_id] for query_id in batch[ID_COLUMN]]]
        parts += [[texts["passage"][passage_id] for passage_id in column] for column in zip(*batch["passage_ids"], strict=True)]
        labels = {}
        if label_column is not None:
            given = batch[label_column]
            labels[LABEL_COLUMN] = given if label_scale == 1 else [[label_scale * value for value in row] for row in given]
        return {**dict(zip(columns, parts, strict=True)), **labels, ID_COLUMN: batch[ID_COLUMN]}

    return join


def _join_texts(texts: Mapping[Role, Mapping[str, str]], dimension: int) -> Callable[[_Batch], _Batch]:
    def join(batch: _Batch) -> _Batch:
        import torch

        roles, text_ids = batch["role"], batch["text_id"]
        vectors_BV = torch.zeros(len(text_ids), dimension)
        for row, (indices, values) in enumerate(zip(batch["indices"], batch["values"], strict=True)):
            vectors_BV[row, torch.tensor(indices)] = torch.tensor(values)
        return {
            "sentence": [texts[role][text_id] for role, text_id in zip(roles, text_ids, strict=True)],
            LABEL_COLUMN: list(vectors_BV),
            ID_COLUMN: [f"{role} {text_id}" for role, text_id in zip(roles, text_ids, strict=True)],
        }

    return join


def dims_are_terms(model: SparseEncoder) -> bool:
    """Whether each dim of the student's vectors is a term of its tokenizer: not so for an autoencoder's."""
    return not any(type(module).__name__ == "SparseAutoEncoder" for module in model.modules())


def tokenizer_of(model: SparseEncoder) -> Any:
    """Return the student's tokenizer, whichever route holds it; both routes have the same."""
    first: Any = model[0]
    routes = getattr(first, "sub_modules", None)
    return first.tokenizer if routes is None else next(iter(routes.values()))[0].tokenizer
