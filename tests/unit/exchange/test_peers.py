"""Exports in the hands of PyLate's and FlagEmbedding's own loaders, where those are importable.

Neither is a dependency: PyLate's pins exclude the sentence-transformers and transformers of today, but the loaders of both run
beside them. To run these tests, install both in a folder of their own and name it:

    pip install --no-deps --target FOLDER pylate FlagEmbedding
    PYTHONPATH=FOLDER python -m pytest -m slow tests/unit/exchange/test_peers.py

docs/formats.md says with which versions they passed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsekd.exchange.layouts import LAYOUTS

pytestmark = pytest.mark.slow

Rows = list[tuple[str, list[str], list[float]]]


def peer(module: str) -> Any:
    """Import a peer's module, whose own warnings are its own; skip where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(module, reason=f"{module} is not importable: see this file's first lines")


@pytest.mark.parametrize("way", ["transform", "map"])
def test_pylates_kd_processing_gives_the_tables_rows(
    way: str, export: Callable[[str], Path], expected: Rows, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processing = peer("pylate.utils").KDProcessing
    from datasets import load_dataset

    folder = str(export("pylate"))
    train, queries, documents = (
        load_dataset(folder, name, split="train", cache_dir=str(tmp_path / "cache")) for name in ("train", "queries", "documents")
    )

    prepared = processing(queries=queries, documents=documents)
    if way == "transform":
        train.set_transform(prepared.transform)
    else:
        train = train.map(prepared.map)

    assert [(row["query"], row["documents"], row["scores"]) for row in train] == expected
    assert "Unable to find document" not in caplog.text


@pytest.fixture
def flagembedding(export: Callable[[str], Path], tmp_path: Path) -> Callable[[Any], Any]:
    """Return ``make(tokenizer)``: FlagEmbedding's data set for distillation over the exported file, groups of 1 + 2 passages."""
    module = peer("FlagEmbedding.abc.finetune.embedder")

    def make(tokenizer: Any) -> Any:
        arguments = module.AbsEmbedderDataArguments(
            train_data=[str(export("flagembedding") / LAYOUTS["flagembedding"].file_name)],
            cache_path=str(tmp_path / "cache"),
            train_group_size=3,
            knowledge_distillation=True,
        )
        return module.AbsEmbedderTrainDataset(arguments, tokenizer)

    return make


def test_flagembeddings_data_set_gives_the_tables_rows(flagembedding: Callable[[Any], Any], expected: Rows) -> None:
    dataset = flagembedding(None)

    assert len(dataset) == len(expected)
    for place, (query, passages, scores) in enumerate(expected):
        found_query, found_passages, found_scores = dataset[place]
        assert (found_query, found_passages[0], found_scores[0]) == (query, passages[0], scores[0])
        # It draws the negatives in an order of its own.
        assert sorted(zip(found_passages, found_scores, strict=True)) == sorted(zip(passages, scores, strict=True))


def test_flagembeddings_collator_makes_a_batch_of_them(
    flagembedding: Callable[[Any], Any], expected: Rows, tiny_headless_folder: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_headless_folder)
    dataset = flagembedding(tokenizer)
    collate = peer("FlagEmbedding.abc.finetune.embedder").AbsEmbedderCollator(tokenizer, query_max_len=16, passage_max_len=32)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = collate([dataset[0], dataset[1]])

    assert batch["queries"]["input_ids"].shape[0] == 2
    assert batch["passages"]["input_ids"].shape[0] == 6
    assert sorted(batch["teacher_scores"]) == sorted([*expected[0][2], *expected[1][2]])
