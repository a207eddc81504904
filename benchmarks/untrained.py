"""How well a recipe's student ranks before any step, by where it starts: nDCG@10 on dev queries, for residual scales and sides.

No training and no teacher: what it shows is which [student] residual_scale to start from. Ranked are the positives of some dev
queries and other passages up to the number asked for, so figures are higher than on the whole collection and compare within one
run only; BM25 over the same passages stands beside them. Queries and passages are those of smallest sha256.

    python benchmarks/untrained.py --recipe pipeline/recipes/nfcorpus.toml
    python benchmarks/untrained.py --recipe pipeline/recipes/nfcorpus.toml --set collection.path=data/collections/medquad
    python benchmarks/untrained.py --quick
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

QUICKSTART = Path(__file__).resolve().parents[1] / "pipeline" / "recipes" / "quickstart.toml"
QUICK = {"queries": 50, "passages": 400, "scales": [1.0, 0.5]}


def main() -> None:
    """Measure every start; print a table and, last, one JSON line."""
    from sparsekd.collection.beir import read_collection
    from sparsekd.recipe import load_recipe

    options = parse_arguments()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # a table of the weights that the head starts without
    recipe = load_recipe(options.recipe, options.set)
    wanted = recipe.collection
    collection = read_collection(Path(wanted.path), max_passages=wanted.max_passages)
    qrels = {query_id: collection.qrels["dev"][query_id] for query_id in smallest(collection.qrels["dev"], options.queries)}
    queries = {query_id: collection.queries[query_id] for query_id in qrels}
    passages = {passage_id: collection.passages[passage_id] for passage_id in chosen(collection, qrels, options.passages)}
    print(f"{wanted.path}: {len(queries)} dev queries, {len(passages)} passages")
    figures: dict[str, Any] = {"bench": "untrained", "queries": len(queries), "passages": len(passages)}
    figures["bm25"] = bm25(recipe.evaluation, queries, passages, qrels)
    print(f"{'bm25':>24}  {figures['bm25']:.4f}", flush=True)
    for scale in options.scales:
        student = recipe.student.model_copy(update={"residual_scale": scale})
        for side, found in untrained(student, collection, queries, passages, qrels).items():
            figures[f"{scale:g}, {side}"] = found
            dims = f"{found['query_active_dims']:.1f} / {found['passage_active_dims']:.1f}"
            print(f"{f'scale {scale:g}, {side}':>24}  {found['nDCG@10']:.4f}  {dims} active dims", flush=True)
    print(json.dumps(figures))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50 queries, 400 passages, scales 1 and .5")
    parser.add_argument("--recipe", type=Path, default=QUICKSTART)
    parser.add_argument("--set", action="append", default=[], help="section.key=value of the recipe")
    parser.add_argument("--queries", type=int, default=150)
    parser.add_argument("--passages", type=int, default=1500)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 0.5, 0.35])
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    return options


def smallest(ids: Iterable[str], count: int) -> list[str]:
    """Return ``count`` of the ids, those of smallest sha256."""
    return heapq.nsmallest(count, ids, key=lambda text_id: hashlib.sha256(text_id.encode()).digest())


def chosen(collection: Any, qrels: Mapping[str, Mapping[str, int]], count: int) -> list[str]:
    """Return the ids of all positives, and of other passages up to ``count`` in all."""
    positives = {passage_id for grades in qrels.values() for passage_id, grade in grades.items() if grade > 0}
    others = smallest(set(collection.passages) - positives, max(0, count - len(positives)))
    return sorted(positives | set(others))


def bm25(settings: Any, queries: dict[str, str], passages: dict[str, str], qrels: Any) -> float:
    """Return BM25's nDCG@10 over the chosen passages."""
    from sparsekd.evaluation.measures import DEPTH, measure
    from sparsekd.evaluation.runs import Ranking
    from sparsekd.mining.bm25 import BM25Index

    ids, scores = BM25Index(passages, settings.k1, settings.b).search(list(queries.values()), DEPTH)
    return measure(dict(zip(queries, map(Ranking, ids, scores), strict=True)), qrels)["nDCG@10"]


def untrained(student: Any, collection: Any, queries: dict[str, str], passages: dict[str, str], qrels: Any) -> dict[str, Any]:
    """Return nDCG@10 and active dims with the transformer on both sides, and with an IDF table for queries."""
    from sparsekd.evaluation.measures import measure
    from sparsekd.evaluation.student import encode_csr, sparse_rankings, sparsity
    from sparsekd.model_reference import resolve
    from sparsekd.recipe import Run
    from sparsekd.students.building import build_student

    settings: dict[str, Any] = {"batch_tokens": Run().batch_tokens, "fused": True}
    found, passage_csr = {}, None
    for expansion, side in (("passage", "idf queries"), ("both", "both sides")):
        one = student.model_copy(update={"expansion": expansion, "budget": None})
        model = build_student(one, resolve(one.model).path, list(collection.passages.values()))
        if passage_csr is None:  # the same for both: they differ in how a query is encoded
            passage_csr = encode_csr(model, list(passages.values()), role="passage", **settings)
        query_csr = encode_csr(model, list(queries.values()), role="query", **settings)
        rankings = sparse_rankings(query_csr, passage_csr, list(queries), list(passages))
        found[side] = {"nDCG@10": measure(rankings, qrels)["nDCG@10"], **sparsity(query_csr, passage_csr)}
    return found


if __name__ == "__main__":
    main()
