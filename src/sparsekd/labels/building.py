"""Builds the score table: looks scores or vectors up, calibrates and combines scores, and publishes rows with labels.

Costs seconds and no teacher call where everything is banked. Memory: one float32 matrix [R, N] per teacher.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sparsekd.artifact import key_of, publish
from sparsekd.labels.calibration import effective_calibration
from sparsekd.labels.combining import Scores, calibration_of, combined_scores, known_range, references_of, score_range, summarize
from sparsekd.labels.contract import KIND, TABLE_VERSION, Contract, Kind, table_schema
from sparsekd.labels.conversions import margins, triplet_ids, triplet_scores
from sparsekd.labels.rows import GoldSim, Rows, filtering_teacher, reading_teachers, selecting_teacher
from sparsekd.labels.score_table import ScoreTable
from sparsekd.labels.vectors import (
    VectorSource,
    label_texts,
    vector_summary,
    vector_tables,
    vector_teacher,
    vocabulary_digest,
)
from sparsekd.mining.selection import filter_fields
from sparsekd.mining.shards import ROWS_PER_SHARD, write_shards
from sparsekd.recipe import FileTeacher, Recipe

log = logging.getLogger(__name__)

PROMOTED_FILE = "promoted.tsv"
"""Beside the shards of a table whose recipe promotes candidates to positives: which ones they are."""


def teacher_weights(recipe: Recipe) -> dict[str, float]:
    """Return the factor of each labelling teacher's scores, in recipe order; teachers of weight 0 do not label and are not listed.

    Shares that add up to 1 for a mean, the weights as they are for a sum, so that a sum of weights that add up to 1 is the mean.
    Empty for kind none, which no teacher labels; the one sparse teacher for embedding.
    """
    if recipe.labels.kind == "none":
        return {}
    if recipe.labels.kind == "embedding":
        return {vector_teacher(recipe): 1.0}
    given = recipe.labels.weights or {teacher.name: 1.0 for teacher in recipe.teachers}
    total = sum(given.values()) if recipe.labels.combine == "mean" else 1.0
    return {teacher.name: given[teacher.name] / total for teacher in recipe.teachers if given.get(teacher.name, 0) > 0}


def scored_teachers(recipe: Recipe) -> list[str]:
    """Return the names of the teachers whose scores of every candidate the table asks for, in recipe order.

    All of them where scores label, also those of weight 0, so that a change of weights calls none; else those that decide which
    rows there are.
    """
    if recipe.labels.kind in ("none", "embedding"):
        return [teacher.name for teacher in recipe.teachers if teacher.name in reading_teachers(recipe)]
    return [teacher.name for teacher in recipe.teachers]


def incomplete_teachers(recipe: Recipe) -> list[str]:
    """Return the names of the teachers whose imported scores may lack pairs, in recipe order.

    With ``missing = "renormalize"`` and another teacher to take over the weight: those that label or give a reference. What reads
    scores to choose rows needs them all.
    """
    weights = teacher_weights(recipe)
    if recipe.labels.missing != "renormalize" or len(weights) < 2:
        return []
    names = {*weights, *references_of(recipe.labels, weights)}.difference(reading_teachers(recipe))
    return [teacher.name for teacher in recipe.teachers if isinstance(teacher, FileTeacher) and teacher.name in names]


def table_folder(cache: Path, fields: Mapping[str, Any]) -> Path:
    """Return where the table made from ``fields`` is, or will be."""
    return cache / "tables" / key_of(fields)


def table_fields(recipe: Recipe, candidates_key: str, teacher_identities: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return everything that can change the table, for ``artifact.key_of``.

    ``teacher_identities`` by name; those of teachers that neither label, filter nor select do not enter, nor do names, settings
    that do not act (a seed under ``top``, a calibration where no score labels, triplets of one negative), or anything of training.
    """
    labels, filtering = recipe.labels, filtering_teacher(recipe)
    return {
        "stage": KIND,
        "version": TABLE_VERSION,
        "candidates": candidates_key,
        "kind": labels.kind,
        "num_negatives": labels.num_negatives,
        "selection": _selection_fields(recipe, teacher_identities),
        **_combination_fields(recipe, teacher_identities),
        "filter": None
        if filtering is None
        else {**filter_fields(recipe.mining.filter), "identity": dict(teacher_identities[filtering])},
        **({"layout": "triplets"} if _becomes_triplets(recipe) else {}),
    }


def _combination_fields(recipe: Recipe, teacher_identities: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What decides a passage's score, given the rows: one calibration where it is all teachers', else each teacher's own."""
    labels, weights = recipe.labels, teacher_weights(recipe)
    teachers = [{"identity": dict(teacher_identities[name]), "weight": weight} for name, weight in weights.items()]
    if labels.kind in ("none", "embedding"):
        return {"calibration": None, "teachers": teachers}
    keys = {name: key_of(identity) for name, identity in teacher_identities.items()}
    effective = [effective_calibration(calibration_of(labels, name), keys) for name in weights]
    is_one = all(each == effective[0] for each in effective)
    if not is_one:
        teachers = [{**teacher, "calibration": each} for teacher, each in zip(teachers, effective, strict=True)]
    return {
        "calibration": effective[0] if is_one else None,
        "teachers": teachers,
        **({"missing": labels.missing} if labels.missing != "require" and len(weights) > 1 else {}),
        **({"rescale": effective_calibration(labels.rescale, keys)} if labels.rescale.kind != "raw" else {}),
    }


def _selection_fields(recipe: Recipe, teacher_identities: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What decides which candidates become negatives."""
    labels, selecting = recipe.labels, selecting_teacher(recipe)
    fields: dict[str, Any] = {"kind": labels.selection} | ({} if labels.selection == "top" else {"seed": labels.seed})
    if labels.selection == "stratified":
        fields["identity"] = dict(teacher_identities[selecting or ""])
    if labels.promote_above is not None:
        fields["promotion"] = {"above": labels.promote_above, "identity": dict(teacher_identities[selecting or ""])}
    return fields


def build_table(
    recipe: Recipe,
    rows: Rows,
    *,
    cache: Path,
    fields: Mapping[str, Any],
    gold_sim: GoldSim | None = None,
    vectors: VectorSource | None = None,
    counts: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> ScoreTable:
    """Label ``rows`` and publish them under the key of ``fields`` (``table_fields``).

    ``gold_sim`` is asked where scores label, ``vectors`` where vectors do, neither for kind none. ``counts`` (pairs,
    pairs_scored, pairs_reused, the mining counts) and ``extra`` (command, versions) are recorded.
    Raises ValueError if the bank lacks a score, a calibration is undefined, or no row is left.
    """
    if recipe.labels.kind == "embedding":
        made = _texts(rows, fields, vectors)
    elif recipe.labels.kind == "none":
        made = _bare_rows(recipe, rows)
    else:
        made = _scored_rows(recipe, rows, fields, gold_sim)
    published: dict[str, Any] = {
        **(extra or {}),
        "counts": {
            **(counts or {}),
            "rows": made.num_rows,
            "rows_dropped": made.dropped,
            "candidates_dropped_filter": rows.candidates_dropped_filter,
        },
        "summary": made.summary,
        "teachers": teacher_weights(recipe),
    }
    if recipe.labels.promote_above is not None:
        published["counts"]["positives_promoted"] = len(rows.promoted)
    folder = table_folder(cache, fields)
    with publish(folder, kind=KIND, fields=fields, extra=published) as temporary:
        if recipe.labels.promote_above is not None:
            _write_promoted(temporary / PROMOTED_FILE, rows)
        published["shards"] = write_shards(temporary, KIND, made.tables, -(-made.num_rows // ROWS_PER_SHARD))
    kind = recipe.labels.kind
    log.info("table %s: %d rows of kind %s, dropped %s, %s", folder.name, made.num_rows, kind, made.dropped, made.summary)
    return ScoreTable.open(folder)


def _write_promoted(path: Path, rows: Rows) -> None:
    """Mark the positives that nobody judged: tab-separated lines of query_id, passage_id and gold_sim, in the order of the rows."""
    lines = [f"{query_id}\t{passage_id}\t{np.float32(score)!s}\n" for query_id, passage_id, score in rows.promoted]
    path.write_text("query_id\tpassage_id\tgold_sim\n" + "".join(lines), encoding="utf-8", newline="\n")


@dataclass(frozen=True)
class _Made:
    """What is to be published: Arrow tables shard by shard, and what the manifest says of them."""

    num_rows: int
    tables: Iterable[Any]
    dropped: dict[str, int]
    summary: dict[str, Any]


def _scored_rows(recipe: Recipe, rows: Rows, fields: Mapping[str, Any], gold_sim: GoldSim | None) -> _Made:
    """Rows of kind score_list, margin or similarity."""
    if gold_sim is None:
        raise ValueError(f"[labels] kind = {recipe.labels.kind!r} needs teacher scores; none were given")
    labels = recipe.labels
    combined = combined_scores(rows, teacher_weights(recipe), labels, gold_sim)
    scores, kept = combined.gold_sim, np.flatnonzero(combined.is_kept).tolist()
    query_ids, passage_ids = [rows.query_ids[row] for row in kept], [rows.passage_ids[row] for row in kept]
    dropped = {**rows.dropped, "constant_scores": len(rows.query_ids) - len(kept)}
    summary = {
        **summarize(scores, labels.kind),
        "raw_gold_sim": {name: known_range(part) for name, part in combined.raw.items()},
    }
    if "missing" in fields:
        summary["unscored"] = {name: int(np.isnan(part).sum()) for name, part in combined.raw.items()}
    if _becomes_triplets(recipe):
        query_ids, passage_ids = triplet_ids(query_ids, passage_ids)
        scores = triplet_scores(scores)
    label_range: tuple[float, float] | None = None
    label_values = scores
    if labels.kind == "margin":
        label_values = margins(scores)
    elif labels.kind == "similarity":
        query_ids, passage_ids, scores, dropped["duplicate_pairs"] = _single_pairs(query_ids, passage_ids, scores)
        label_values, label_range = _unit_range(scores)
        summary |= {"similarity": score_range(label_values), "range": {"min": label_range[0], "max": label_range[1]}}
    contract = Contract(
        num_passages=len(passage_ids[0]),
        teachers=_without_names(fields),
        calibration=fields["calibration"],
        rescale=fields.get("rescale"),
        label_range=label_range,
    )
    return _Made(len(query_ids), _tables(labels.kind, contract, query_ids, passage_ids, label_values), dropped, summary)


def _bare_rows(recipe: Recipe, rows: Rows) -> _Made:
    """Rows of kind none: ids alone."""
    query_ids, passage_ids = rows.query_ids, rows.passage_ids
    if _becomes_triplets(recipe):
        query_ids, passage_ids = triplet_ids(query_ids, passage_ids)
    contract = Contract(num_passages=len(passage_ids[0]))
    summary = {
        "queries": len(set(query_ids)),
        "passages": len({passage_id for passages in passage_ids for passage_id in passages}),
    }
    return _Made(len(query_ids), _tables("none", contract, query_ids, passage_ids, None), dict(rows.dropped), summary)


def _texts(rows: Rows, fields: Mapping[str, Any], vectors: VectorSource | None) -> _Made:
    """Rows of kind embedding: one text each."""
    if vectors is None:
        raise ValueError("[labels] kind = 'embedding' needs the teacher's vectors; none were given")
    texts = label_texts(rows, vectors)
    contract = Contract(
        num_passages=0,
        teachers=_without_names(fields),
        dimension=int(texts.vectors.shape[1]),
        vocabulary=None if vectors.vocabulary is None else vocabulary_digest(vectors.vocabulary),
    )
    dropped = {**rows.dropped, "empty_vectors": texts.num_empty}
    return _Made(len(texts.text_ids), vector_tables(texts, contract), dropped, vector_summary(texts))


def _without_names(fields: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """What a table says of its teachers: key of the identity, factor, and calibration where they differ."""
    return tuple({**teacher, "identity": key_of(teacher["identity"])} for teacher in fields["teachers"])


def _becomes_triplets(recipe: Recipe) -> bool:
    """Whether the layout acts: a pair's or a text's row has no negatives to part, and a row of one negative is a triplet."""
    labels = recipe.labels
    return labels.layout == "triplets" and labels.kind in ("score_list", "margin", "none") and labels.num_negatives != 1


def _single_pairs(
    query_ids: list[str], passage_ids: list[list[str]], gold_sim_RN: Scores
) -> tuple[list[str], list[list[str]], Scores, int]:
    """Part rows into (query, passage) pairs, each once: positives of one query share negatives, and the first one's row counts."""
    place_by_pair: dict[tuple[str, str], int] = {}
    num_passages = gold_sim_RN.shape[1]
    for row, (query_id, passages) in enumerate(zip(query_ids, passage_ids, strict=True)):
        for column, passage_id in enumerate(passages):
            place_by_pair.setdefault((query_id, passage_id), row * num_passages + column)
    places = np.fromiter(place_by_pair.values(), dtype=np.int64, count=len(place_by_pair))
    scores = gold_sim_RN.reshape(-1)[places]
    pairs = list(place_by_pair)
    num_repeated = gold_sim_RN.size - len(pairs)
    return [query_id for query_id, _ in pairs], [[passage_id] for _, passage_id in pairs], scores.reshape(-1, 1), num_repeated


def _unit_range(gold_sim_R1: Scores) -> tuple[Scores, tuple[float, float]]:
    """Move scores to 0..1 by one min-max over the table; return them and the scores at 0 and 1. ValueError without a range."""
    low, high = float(gold_sim_R1.min()), float(gold_sim_R1.max())
    if not high > low:
        raise ValueError(
            f"[labels] kind = 'similarity': all {gold_sim_R1.size} combined gold_sim equal {low:g}, so there is no range to move "
            "to 0..1; check the teachers"
        )
    moved = (gold_sim_R1.astype(np.float64) - low) / (high - low)
    return moved.astype(np.float32), (low, high)


def _tables(
    kind: Kind, contract: Contract, query_ids: list[str], passage_ids: list[list[str]], labels_RW: Scores | None
) -> Iterator[Any]:
    """Yield one Arrow table per shard."""
    schema = table_schema(kind, contract)
    for start in range(0, len(query_ids), ROWS_PER_SHARD):
        part = slice(start, start + ROWS_PER_SHARD)
        flat_ids = [passage_id for passages in passage_ids[part] for passage_id in passages]
        columns = [
            pa.array(query_ids[part], pa.string()),
            pa.FixedSizeListArray.from_arrays(pa.array(flat_ids, pa.string()), contract.num_passages),
        ]
        if labels_RW is not None:
            flat = pa.array(np.ascontiguousarray(labels_RW[part]).reshape(-1), pa.float32())
            columns.append(flat if kind == "similarity" else pa.FixedSizeListArray.from_arrays(flat, labels_RW.shape[1]))
        yield pa.Table.from_arrays(columns, schema=schema)
