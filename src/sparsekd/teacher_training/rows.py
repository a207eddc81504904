"""The rows a cross-encoder is fine-tuned on: a query, its positive and drawn candidates, labelled 1 and 0. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sparsekd.collection.beir import Collection
from sparsekd.labels.negatives import choose_negatives
from sparsekd.mining.candidates import CandidateRow
from sparsekd.recipe import Labels, TrainTeacher


@dataclass(frozen=True)
class TeacherRows:
    """Aligned: query_ids [R] and passage_ids [R][N], positive first; and how many rows had too few candidates."""

    query_ids: list[str]
    passage_ids: list[list[str]]
    num_dropped: int

    def columns(self, collection: Collection) -> dict[str, list[str] | list[list[str]] | list[list[float]]]:
        """Return the texts and labels, as the library's listwise and pairwise losses take them."""
        return {
            "query": [collection.queries[query_id] for query_id in self.query_ids],
            "passages": [[collection.passages[passage_id] for passage_id in ids] for ids in self.passage_ids],
            "labels": [[1.0] + [0.0] * (len(ids) - 1) for ids in self.passage_ids],
        }


def teacher_rows(section: TrainTeacher, candidates: Iterable[CandidateRow]) -> TeacherRows:
    """Return one row per (query, positive) with ``num_negatives`` of the query's candidates, drawn with a seed per query id.

    Raises ValueError if no row is left.
    """
    labels = Labels(selection="random", num_negatives=section.num_negatives, seed=section.seed)
    query_ids: list[str] = []
    passage_ids: list[list[str]] = []
    num_dropped = 0
    for row in candidates:
        negatives = choose_negatives(row, range(len(row.passage_ids)), labels)
        if len(negatives) < section.num_negatives:
            num_dropped += len(row.positive_ids)
            continue
        for positive_id in row.positive_ids:
            query_ids.append(row.query_id)
            passage_ids.append([positive_id, *negatives])
    if not query_ids:
        raise ValueError(
            f"[train_teacher] num_negatives = {section.num_negatives}: none of {num_dropped} train judgements has as many "
            "candidates; lower num_negatives, raise the miners' quota or give [mining.fallback] a random miner"
        )
    return TeacherRows(query_ids, passage_ids, num_dropped)
