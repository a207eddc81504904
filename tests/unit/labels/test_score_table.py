from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sparsekd.artifact import IntegrityError, publish
from sparsekd.labels.score_table import KIND, ScoreTable, check_for_loss, table_schema
from sparsekd.mining.shards import write_shards

TEACHERS = [{"identity": "0123", "weight": 1.0}]
ROWS = [
    {"query_id": "q0", "passage_ids": ["x", "a", "b"], "gold_sim": [8.0, 2.0, 5.0]},
    {"query_id": "q1", "passage_ids": ["y", "c", "d"], "gold_sim": [1.0, 9.0, -3.0]},
]
MARGINS = [{"query_id": "q0", "passage_ids": ["x", "a", "b"], "margin": [6.0, 3.0]}]


@pytest.fixture
def published(tmp_path: Path) -> Callable[..., Path]:
    """Return ``publish(rows, ...)``: a folder whose checksums are right, whatever it holds."""

    def make(rows: list[dict[str, Any]] = ROWS, *, schema: Any = None, shards: Any = None, num_shards: int = 1) -> Path:
        folder = tmp_path / "table"
        shutil.rmtree(folder, ignore_errors=True)
        kind: Any = "margin" if "margin" in rows[0] else "score_list"
        schema = schema or table_schema(kind, 3, teachers=TEACHERS, calibration={"kind": "raw"})
        per_shard = -(-len(rows) // num_shards)
        tables = [
            pa.Table.from_pylist(rows[start : start + per_shard], schema=schema) for start in range(0, len(rows), per_shard)
        ]
        extra: dict[str, Any] = {"counts": {}, "summary": {}}
        with publish(folder, kind=KIND, fields={"a": 1}, extra=extra) as temporary:
            written = write_shards(temporary, KIND, tables, num_shards)
            extra["shards"] = written if shards is None else shards
        return folder

    return make


def with_metadata(**changes: str) -> Any:
    schema = table_schema("score_list", 3, teachers=TEACHERS, calibration={"kind": "raw"})
    return schema.with_metadata({**schema.metadata, **{f"sparsekd.{name}".encode(): value for name, value in changes.items()}})


def test_what_was_published_opens_with_its_contract(published: Any) -> None:
    table = ScoreTable.open(published())

    assert (table.kind, table.num_passages, table.teachers, table.calibration) == ("score_list", 3, TEACHERS, {"kind": "raw"})
    assert list(table.rows())[1] == ("q1", ["y", "c", "d"], [1.0, 9.0, -3.0])
    assert table.labels().tolist() == [[8.0, 2.0, 5.0], [1.0, 9.0, -3.0]]


@pytest.mark.parametrize("rows", [ROWS, MARGINS], ids=["score_list", "margin"])
def test_datasets_loads_every_shard(published: Any, rows: list[dict[str, Any]]) -> None:
    datasets = pytest.importorskip("datasets")
    table = ScoreTable.open(published(rows, num_shards=len(rows)))

    parts = [datasets.Dataset.from_file(str(path)) for path in table.shard_paths]

    assert datasets.concatenate_datasets(parts).to_list() == rows


def test_every_cut_and_every_flipped_byte_is_refused_by_name(published: Any) -> None:
    folder = published()
    shard = folder / "score-table-00000-of-00001.arrow"
    whole = shard.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 64)]
    damaged += [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(0, len(whole), 97)]

    for content in damaged:
        shard.write_bytes(content)
        with pytest.raises(IntegrityError, match=r"score-table-00000-of-00001\.arrow: checksum"):
            ScoreTable.open(folder)


def test_a_shard_that_is_gone_or_swapped_is_refused_by_name(published: Any) -> None:
    folder = published(num_shards=2)
    first, second = sorted(folder.glob("*.arrow"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)

    with pytest.raises(IntegrityError, match="score-table-00000-of-00002"):
        ScoreTable.open(folder)
    first.unlink()
    with pytest.raises(IntegrityError, match=r"score-table-00000-of-00002\.arrow: missing"):
        ScoreTable.open(folder)


def test_rows_other_than_the_manifests_are_refused(published: Any) -> None:
    with pytest.raises(IntegrityError, match=r"arrow: 2 rows, its manifest says 3; remove"):
        ScoreTable.open(published(shards={"score-table-00000-of-00001.arrow": 3}))
    with pytest.raises(IntegrityError, match="lists no shard"):
        ScoreTable.open(published(shards={}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "embedding"}, "sparsekd.kind is 'embedding', expected 'score_list' or 'margin'"),
        ({"kind": "margin"}, "columns or metadata are not those of a margin table of 3 passages"),
        ({"order": "negative first"}, "sparsekd.order is 'negative first', expected 'positive first'"),
        ({"num_passages": "4"}, "columns or metadata are not those of a score_list table of 4 passages"),
        ({"num_passages": "1"}, "1 passages per row, expected a positive and at least one negative"),
        ({"num_passages": "many"}, "metadata is incomplete"),
        ({"version": "99"}, "sparsekd.version is '99', expected '1'"),
        ({"teachers": "{"}, "metadata is incomplete"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(published: Any, changes: dict[str, str], message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        ScoreTable.open(published(schema=with_metadata(**changes)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold_sim": [1.0, float("nan"), 2.0]}, "1 labels of gold_sim are not finite"),
        ({"gold_sim": [1.0, float("-inf"), 2.0]}, "1 labels of gold_sim are not finite"),
        ({"gold_sim": [1.0, None, 2.0]}, "holds nulls"),
        ({"query_id": ""}, "holds an empty id"),
        ({"passage_ids": ["x", "", "b"]}, "holds an empty id"),
        ({"passage_ids": ["x", "a", "x"]}, r"1 rows hold a passage twice \(first: query 'q1'\)"),
    ],
)
def test_rows_that_teach_nonsense_are_refused(published: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(IntegrityError, match=rf"score-table-00000-of-00001\.arrow: {message}"):
        ScoreTable.open(published([ROWS[0], {**ROWS[1], **change}]))


def test_another_artifact_is_refused(published: Any) -> None:
    manifest = published() / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "kind": "candidates"}))

    with pytest.raises(IntegrityError, match="holds 'candidates', expected 'score-table'"):
        ScoreTable.open(manifest.parent)


def test_losses_take_the_kinds_they_can_learn_from(published: Any) -> None:
    check_for_loss(ScoreTable.open(published()), "SparseDistillKLDivLoss")
    check_for_loss(ScoreTable.open(published()), "SparseMarginMSELoss")
    margins = ScoreTable.open(published(MARGINS))
    check_for_loss(margins, "SparseMarginMSELoss")

    with pytest.raises(
        ValueError, match=r"needs score lists of 3 gold_sim, but .*table holds 2 margins per row; set \[labels\] kind = "
    ):
        check_for_loss(margins, "SparseDistillKLDivLoss")
    with pytest.raises(ValueError, match="loss = 'SparseMSELoss' is not a loss over score tables; expected one of"):
        check_for_loss(margins, "SparseMSELoss")
