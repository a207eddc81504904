from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sparsekd.artifact import IntegrityError, publish, read_manifest, write_manifest
from sparsekd.labels.contract import KIND, Contract, table_schema
from sparsekd.labels.score_table import ScoreTable, check_for_loss
from sparsekd.mining.shards import write_shards

TEACHERS = ({"identity": "0123", "weight": 1.0},)
SCORED = Contract(num_passages=3, teachers=TEACHERS, calibration={"kind": "raw"})
ROWS = [
    {"query_id": "q0", "passage_ids": ["x", "a", "b"], "gold_sim": [8.0, 2.0, 5.0]},
    {"query_id": "q1", "passage_ids": ["y", "c", "d"], "gold_sim": [1.0, 9.0, -3.0]},
]
MARGINS = [{"query_id": "q0", "passage_ids": ["x", "a", "b"], "margin": [6.0, 3.0]}]
BARE = [{"query_id": "q0", "passage_ids": ["x"]}, {"query_id": "q1", "passage_ids": ["y"]}]
SIMILARITIES = [
    {"query_id": "q0", "passage_ids": ["x"], "similarity": 1.0},
    {"query_id": "q0", "passage_ids": ["a"], "similarity": 0.25},
]
VECTORS = [
    {"role": "query", "text_id": "q0", "indices": [2, 5], "values": [0.5, 1.5]},
    {"role": "passage", "text_id": "x", "indices": [0], "values": [2.0]},
]
CONTRACTS: dict[str, Contract] = {
    "score_list": SCORED,
    "margin": SCORED,
    "none": Contract(num_passages=1),
    "similarity": Contract(1, TEACHERS, {"kind": "raw"}, label_range=(-3.0, 9.0)),
    "embedding": Contract(0, TEACHERS, dimension=6, vocabulary="00ff"),
}
ROWS_OF: dict[str, list[dict[str, Any]]] = {
    "score_list": ROWS,
    "margin": MARGINS,
    "none": BARE,
    "similarity": SIMILARITIES,
    "embedding": VECTORS,
}


@pytest.fixture
def published(tmp_path: Path) -> Callable[..., Path]:
    """Return ``publish(rows, ...)``: a folder whose checksums are right, whatever it holds."""

    def make(
        rows: list[dict[str, Any]] = ROWS, *, schema: Any = None, shards: Any = None, num_shards: int = 1, schemas: Any = None
    ) -> Path:
        folder = tmp_path / "table"
        shutil.rmtree(folder, ignore_errors=True)
        kind: Any = next(name for name, theirs in ROWS_OF.items() if theirs[0].keys() == rows[0].keys())
        schemas = schemas or [schema or table_schema(kind, CONTRACTS[kind])] * num_shards
        per_shard = -(-len(rows) // num_shards)
        parts = [rows[start : start + per_shard] for start in range(0, len(rows), per_shard)]
        tables = [pa.Table.from_pylist(part, schema=schema) for part, schema in zip(parts, schemas, strict=True)]
        extra: dict[str, Any] = {"counts": {}, "summary": {}}
        with publish(folder, kind=KIND, fields={"a": 1}, extra=extra) as temporary:
            written = write_shards(temporary, KIND, tables, num_shards)
            extra["shards"] = written if shards is None else shards
        return folder

    return make


def with_metadata(**changes: str) -> Any:
    schema = table_schema("score_list", SCORED)
    return schema.with_metadata({**schema.metadata, **{f"sparsekd.{name}".encode(): value for name, value in changes.items()}})


def test_what_was_published_opens_with_its_contract(published: Any) -> None:
    table = ScoreTable.open(published())

    assert (table.kind, table.num_passages, table.teachers, table.calibration) == ("score_list", 3, [*TEACHERS], {"kind": "raw"})
    assert list(table.rows())[1] == ("q1", ["y", "c", "d"], [1.0, 9.0, -3.0])
    assert table.labels().tolist() == [[8.0, 2.0, 5.0], [1.0, 9.0, -3.0]]


@pytest.mark.parametrize("kind", ROWS_OF)
def test_datasets_loads_every_shard(published: Any, kind: str) -> None:
    datasets, rows = pytest.importorskip("datasets"), ROWS_OF[kind]
    table = ScoreTable.open(published(rows, num_shards=len(rows)))

    parts = [datasets.Dataset.from_file(str(path)) for path in table.shard_paths]

    assert datasets.concatenate_datasets(parts).to_list() == rows


@pytest.mark.parametrize("kind", ROWS_OF)
def test_each_kind_opens_as_itself(published: Any, kind: str) -> None:
    table = ScoreTable.open(published(ROWS_OF[kind]))

    assert (table.kind, len(table), table.contract) == (kind, len(ROWS_OF[kind]), CONTRACTS[kind])


def test_a_table_of_margins_holds_one_less_than_passages(published: Any) -> None:
    assert list(ScoreTable.open(published(MARGINS)).rows()) == [("q0", ["x", "a", "b"], [6.0, 3.0])]


def test_a_table_without_labels_says_so(published: Any) -> None:
    table = ScoreTable.open(published(BARE))

    assert list(table.rows()) == [("q0", ["x"], []), ("q1", ["y"], [])]
    assert (table.label_column, table.num_passages, table.teachers, table.calibration) == (None, 1, [], {})
    with pytest.raises(ValueError, match="a table of kind 'none' has no matrix of labels"):
        table.labels()


def test_a_table_of_similarities_knows_the_scores_at_0_and_1(published: Any) -> None:
    table = ScoreTable.open(published(SIMILARITIES))

    assert list(table.rows()) == [("q0", ["x"], [1.0]), ("q0", ["a"], [0.25])]
    assert table.labels().tolist() == [[1.0], [0.25]]
    assert table.contract.label_range == (-3.0, 9.0)


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_table_of_vectors_gives_them_back_sparse(published: Any, num_shards: int) -> None:
    table = ScoreTable.open(published(VECTORS, num_shards=num_shards))

    assert table.vectors().toarray().tolist() == [[0, 0, 0.5, 0, 0, 1.5], [2.0, 0, 0, 0, 0, 0]]
    assert (table.num_passages, table.contract.dimension, table.contract.vocabulary) == (0, 6, "00ff")
    for ask in (table.labels, lambda: list(table.rows())):
        with pytest.raises(ValueError, match="a table of kind 'embedding' h"):
            ask()
    with pytest.raises(ValueError, match="a table of kind 'none' has no vectors"):
        ScoreTable.open(published(BARE)).vectors()


def test_texts_are_every_id_once_by_role(published: Any) -> None:
    assert ScoreTable.open(published(num_shards=2)).texts() == {"query": ["q0", "q1"], "passage": [*"xabycd"]}
    assert ScoreTable.open(published(SIMILARITIES, num_shards=2)).texts() == {"query": ["q0"], "passage": ["x", "a"]}
    assert ScoreTable.open(published(VECTORS)).texts() == {"query": ["q0"], "passage": ["x"]}


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
        ({"kind": "class"}, "sparsekd.kind is 'class', expected one of 'score_list', 'margin', 'none', 'similarity', 'embedding'"),
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
    folder = published()
    write_manifest(folder, {**read_manifest(folder), "kind": "candidates"})

    with pytest.raises(IntegrityError, match="holds 'candidates', expected 'score-table'"):
        ScoreTable.open(folder)


def with_calibration(**calibration: Any) -> Any:
    return table_schema("score_list", Contract(3, TEACHERS, calibration))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (with_calibration(kind="zscore", scale=1.0), r"sparsekd.calibration is '{\"kind\": \"zscore\".*but score-table-00000-of"),
        (with_metadata(teachers='[{"identity": "4567", "weight": 1.0}]'), "sparsekd.teachers is .*4567"),
        (with_metadata(range="[0.0, 2.0]"), "sparsekd.range is "),
    ],
)
def test_labels_on_different_scales_in_one_table_are_refused(published: Any, second: Any, message: str) -> None:
    schemas = [table_schema("score_list", SCORED), second]
    message = rf"00001-of-00002\.arrow: metadata {message}.*: labels on different scales in one table"

    with pytest.raises(ValueError, match=message) as caught:
        ScoreTable.open(published(num_shards=2, schemas=schemas))
    assert type(caught.value) is ValueError  # bad input, which exits with 2; damage exits with 1


@pytest.mark.parametrize(
    ("kind", "contract", "message"),
    [
        ("none", Contract(num_passages=2), "columns or metadata are not those of a none table of 2 passages"),
        ("similarity", Contract(1, TEACHERS), "sparsekd.dimension or sparsekd.range do not fit a similarity table"),
        ("embedding", Contract(0, TEACHERS), "sparsekd.dimension or sparsekd.range do not fit a embedding table"),
        ("score_list", Contract(3, TEACHERS, dimension=4), "sparsekd.dimension or sparsekd.range do not fit a score_list table"),
    ],
)
def test_a_contract_that_does_not_fit_the_kind_is_refused(published: Any, kind: Any, contract: Contract, message: str) -> None:
    schema = table_schema(kind, CONTRACTS[kind]).with_metadata(table_schema(kind, contract).metadata)

    with pytest.raises(IntegrityError, match=message):
        ScoreTable.open(published(ROWS_OF[kind], schema=schema))


@pytest.mark.parametrize(
    ("kind", "num_passages", "expected"),
    [("none", "0", "at least a positive"), ("similarity", "2", "one"), ("embedding", "1", "none: one text per row")],
)
def test_a_number_of_passages_that_a_kind_cannot_have_is_refused(
    published: Any, kind: Any, num_passages: str, expected: str
) -> None:
    schema = table_schema(kind, CONTRACTS[kind])
    schema = schema.with_metadata({**schema.metadata, b"sparsekd.num_passages": num_passages})

    with pytest.raises(IntegrityError, match=f"{num_passages} passages per row, expected {expected}"):
        ScoreTable.open(published(ROWS_OF[kind], schema=schema))


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        (SIMILARITIES, {"similarity": 1.5}, "1 labels of similarity are outside of 0..1"),
        (SIMILARITIES, {"similarity": float("nan")}, "1 labels of similarity are not finite"),
        (SIMILARITIES, {"similarity": None}, "holds nulls"),
        (BARE, {"passage_ids": [""]}, "holds an empty id"),
        (VECTORS, {"values": [float("inf")]}, "1 labels of values are not finite"),
        (VECTORS, {"values": [1.0, 2.0]}, r"1 rows have another number of values than of indices \(first: passage 'x'\)"),
        (VECTORS, {"indices": [], "values": []}, "1 rows have no active dim"),
        (VECTORS, {"indices": [6]}, r"1 rows have indices outside of 0\.\.5"),
        (VECTORS, {"indices": [-1]}, r"1 rows have indices outside of 0\.\.5"),
        (VECTORS, {"indices": [3, 3], "values": [1.0, 1.0]}, "1 rows have indices that do not ascend"),
        (VECTORS, {"indices": [3, 1], "values": [1.0, 1.0]}, "1 rows have indices that do not ascend"),
        (VECTORS, {"indices": [None]}, "holds nulls"),
        (VECTORS, {"text_id": ""}, "holds an empty id"),
        (VECTORS, {"role": "document"}, r"roles are \['document', 'query'\], expected query and passage"),
    ],
)
def test_rows_of_the_other_kinds_that_teach_nonsense_are_refused(
    published: Any, rows: list[dict[str, Any]], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(IntegrityError, match=rf"score-table-00000-of-00001\.arrow: {message}"):
        ScoreTable.open(published([rows[0], {**rows[1], **change}]))


KL, MARGIN_MSE, CONTRASTIVE, TRIPLET = (
    "SparseDistillKLDivLoss",
    "SparseMarginMSELoss",
    "SparseMultipleNegativesRankingLoss",
    "SparseTripletLoss",
)
GRADED = ("SparseCoSENTLoss", "SparseAnglELoss", "SparseCosineSimilarityLoss")
TRIPLES = [{"query_id": "q0", "passage_ids": ["x", "a"], "gold_sim": [8.0, 2.0]}]


@pytest.fixture
def opened(published: Any) -> Callable[[str], ScoreTable]:
    """Return ``opened(kind)``; ``triplet`` is a score list of 2, ``pair`` and ``bare-triplet`` have no labels."""

    def make(kind: str) -> ScoreTable:
        if kind == "triplet":
            return ScoreTable.open(published(TRIPLES, schema=table_schema("score_list", Contract(2, TEACHERS, {"kind": "raw"}))))
        if kind == "bare-triplet":
            rows = [{"query_id": "q0", "passage_ids": ["x", "a"]}]
            return ScoreTable.open(published(rows, schema=table_schema("none", Contract(2))))
        return ScoreTable.open(published(BARE if kind == "pair" else ROWS_OF[kind]))

    return make


@pytest.mark.parametrize(
    ("kind", "losses"),
    [
        ("pair", [CONTRASTIVE]),
        ("bare-triplet", [CONTRASTIVE]),
        ("bare-triplet", [TRIPLET]),
        ("bare-triplet", [CONTRASTIVE, TRIPLET]),
        *[("similarity", [name]) for name in GRADED],
        ("similarity", [*GRADED]),
        ("embedding", ["SparseMSELoss"]),
        ("margin", [MARGIN_MSE]),
        ("margin", [MARGIN_MSE, CONTRASTIVE]),
        ("score_list", [KL]),
        ("score_list", [MARGIN_MSE]),
        ("score_list", [KL, MARGIN_MSE, CONTRASTIVE]),
        ("triplet", [KL, MARGIN_MSE, TRIPLET]),
        *[(kind, ["package.module:Loss"]) for kind in ROWS_OF],
        ("score_list", ["package.module:Loss", CONTRASTIVE]),
    ],
)
def test_losses_take_the_kinds_they_can_learn_from(opened: Any, kind: str, losses: list[str]) -> None:
    check_for_loss(opened(kind), losses)


@pytest.mark.parametrize(
    ("kind", "losses", "message"),
    [
        ("margin", [KL], r"needs score lists of 3 gold_sim, but .*table holds 2 margins per row; set \[labels\] kind ="),
        ("margin", [MARGIN_MSE, KL], "needs score lists of 3 gold_sim, but .*table holds 2 margins per row"),
        ("similarity", [KL], "needs score lists of N gold_sim, but .* one similarity per .*choose loss = \"SparseCoSENTLoss\" or"),
        ("pair", [KL], 'holds 1 passages per row and no label; set .*choose loss = "SparseMultipleNegativesRankingLoss" or "Spa'),
        ("pair", [MARGIN_MSE], "needs score lists of N gold_sim or N−1 margins per row, but"),
        ("embedding", [MARGIN_MSE], 'holds one vector per text; .*choose loss = "SparseMSELoss"'),
        *[("score_list", [name], "needs one similarity per .*holds score lists of 3 gold_sim") for name in GRADED],
        ("score_list", ["SparseMSELoss"], "needs one vector per text"),
        ("similarity", [CONTRASTIVE], "needs N passages per row and no label, but"),
        ("embedding", [CONTRASTIVE], "needs N passages per row and no label, but"),
        ("embedding", ["SparseMSELoss", "a.b:C"], "SparseMSELoss beside a.b:C: .*name it alone"),
        ("score_list", [CONTRASTIVE], r"would ignore the labels of .*\(score lists of 3 gold_sim\); set \[labels\] kind ="),
        ("triplet", [TRIPLET], "would ignore the labels"),
        ("pair", [TRIPLET], r"needs a positive and one negative per row, but .* 1 passages .*layout = \"triplets\""),
        ("score_list", [KL, TRIPLET], "needs a positive and one negative per row, but .* score lists of 3"),
        ("score_list", ["MarginMSELoss"], "loss = 'MarginMSELoss' is not a loss over score tables; expected one of .*module:Class"),
    ],
)
def test_losses_that_would_learn_something_else_are_refused(opened: Any, kind: str, losses: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_for_loss(opened(kind), losses)
