"""What is exported is read, and trained on, by those it is for: datasets, sentence-transformers, and the contracts of others.

What PyLate and FlagEmbedding ask of a file is written down from their sources, which are named; test_peers.py asks themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from sparsekd.exchange.layouts import LAYOUTS
from sparsekd.labels.score_table import ScoreTable

Rows = list[tuple[str, list[str], list[float]]]


def load(path: Path, cache: Path, name: str | None = None) -> Any:
    from datasets import load_dataset

    return load_dataset(str(path), name, split="train", cache_dir=str(cache))


def test_n_tuples_load_as_they_are(export: Callable[[str], Path], expected: Rows, tmp_path: Path) -> None:
    from datasets import Dataset

    folder = export("n-tuples")

    for dataset in (Dataset.from_file(str(folder / "train.arrow")), load(folder, tmp_path / "cache")):
        assert dataset.column_names == ["anchor", "positive", "negative_1", "negative_2", "scores"]
        rows = [(row["anchor"], [row["positive"], row["negative_1"], row["negative_2"]], row["scores"]) for row in dataset]
        assert rows == expected


def test_margins_load_as_they_are(export: Callable[[str], Path], table: ScoreTable, tmp_path: Path) -> None:
    from datasets import Dataset

    folder = export("margins")

    for dataset in (Dataset.from_file(str(folder / "train.arrow")), load(folder, tmp_path / "cache")):
        assert dataset.column_names == ["query_id", "positive_id", "negative_id", "score"]
        assert len(dataset) == 2 * len(table)
        query_id, passage_ids, scores = next(iter(table.rows()))
        first = {"query_id": query_id, "positive_id": passage_ids[0], "negative_id": passage_ids[1]}
        assert dataset[0] == {**first, "score": float(np.float32(scores[0]) - np.float32(scores[1]))}


@pytest.mark.parametrize("layout", ["flagembedding", "tevatron"])
def test_json_lines_load_as_they_are(layout: str, export: Callable[[str], Path], table: ScoreTable, tmp_path: Path) -> None:
    folder = export(layout)

    dataset = load(folder, tmp_path / "cache")

    assert len(dataset) == len(table)
    assert list(dataset) == [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def margin_mse(model: Any) -> Any:
    from sentence_transformers.sparse_encoder.losses import SparseMarginMSELoss

    return SparseMarginMSELoss(model)


def kl(model: Any) -> Any:
    from sentence_transformers.sparse_encoder.losses import SparseDistillKLDivLoss

    return SparseDistillKLDivLoss(model, temperature=2.0)


@pytest.mark.parametrize("loss", [margin_mse, kl])
def test_n_tuples_train_a_step_in_sentence_transformers(
    loss: Callable[[Any], Any], export: Callable[[str], Path], tiny_splade_folder: Path, tmp_path: Path
) -> None:
    from datasets import Dataset
    from sentence_transformers import SparseEncoder, SparseEncoderTrainer, SparseEncoderTrainingArguments
    from sentence_transformers.sparse_encoder.losses import SpladeLoss

    model = SparseEncoder(str(tiny_splade_folder), device="cpu")
    before = {name: weights.clone() for name, weights in model.named_parameters()}
    settings: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "use_cpu": True}
    arguments = SparseEncoderTrainingArguments(
        str(tmp_path / "run"), save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, **settings
    )
    rows = Dataset.from_file(str(export("n-tuples") / "train.arrow"))
    wrapped = SpladeLoss(model, loss(model), document_regularizer_weight=1e-4, query_regularizer_weight=1e-4)

    done = SparseEncoderTrainer(model, arguments, train_dataset=rows, loss=wrapped).train()

    assert done.global_step == 1
    assert np.isfinite(done.training_loss)
    assert any(not weights.equal(before[name]) for name, weights in model.named_parameters())


def test_every_id_of_a_pylate_row_has_its_text(export: Callable[[str], Path], expected: Rows, tmp_path: Path) -> None:
    """The contract of KDProcessing, pylate/utils/processing.py at lightonai/pylate 347718e: the columns query_id, document_ids and
    scores of ``train``; the text of an id is that of the row with this query_id or document_id; one that is missing becomes "".
    """
    folder = export("pylate")

    train, queries, documents = (load(folder, tmp_path / "cache", name) for name in ("train", "queries", "documents"))

    text_of_query = dict(zip(queries["query_id"], queries["text"], strict=True))
    text_of_document = dict(zip(documents["document_id"], documents["text"], strict=True))
    assert (len(text_of_query), len(text_of_document)) == (len(queries), len(documents))
    rows = [
        (text_of_query[row["query_id"]], [text_of_document[each] for each in row["document_ids"]], row["scores"]) for row in train
    ]
    assert rows == expected


def test_a_flagembedding_row_is_what_its_data_set_asks_for(export: Callable[[str], Path], expected: Rows) -> None:
    """The contract of AbsEmbedderTrainDataset, FlagEmbedding/abc/finetune/embedder/AbsDataset.py at FlagOpen/FlagEmbedding 035bbf5:
    a file ending in .jsonl; query a string, pos and neg lists that are not empty; for distillation pos_scores and neg_scores, as
    long as they are, of int or float.
    """
    path = export("flagembedding") / LAYOUTS["flagembedding"].file_name

    for line, (query, passages, scores) in zip(path.read_text(encoding="utf-8").splitlines(), expected, strict=True):
        row = json.loads(line)
        assert [type(row[name]) for name in ("query", "pos", "neg", "pos_scores", "neg_scores")] == [str, *[list] * 4]
        assert (row["query"], row["pos"] + row["neg"]) == (query, passages)
        assert (len(row["pos"]), len(row["pos_scores"]), len(row["neg_scores"])) == (1, 1, len(row["neg"]))
        assert all(type(score) in (int, float) for score in row["pos_scores"] + row["neg_scores"])
        assert row["pos_scores"] + row["neg_scores"] == scores


def test_colbert_reads_numbers_where_ids_are_numbers(
    run: Callable[..., Result], tmp_path: Path, sample_folder: Path, make_table: Callable[..., ScoreTable]
) -> None:
    """The contract of ColBERT's Examples, colbert/data/examples.py: a line is [query_id, [passage_id, score], ...], and its queries
    and collection are keyed by the numbers of their lines. Ids that are words, as here, stay words.
    """
    folder = tmp_path / "out"
    assert run("export", "table", "colbert", make_table().artifact.folder, folder).exit_code == 0

    first = json.loads((folder / "nway.jsonl").read_text(encoding="utf-8").splitlines()[0])

    query_id, passage_ids, scores = next(iter(make_table().rows()))
    assert first == [query_id, *([passage_id, score] for passage_id, score in zip(passage_ids, scores, strict=True))]
