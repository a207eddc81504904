"""The best student of a run by dev nDCG@10, not by its loss: measured every ``dev_steps``, kept on disk, put back at the end.

What is measured is a ranking of a pool: for a fixed sample of dev queries their judged passages and the best of a first stage
(BM25), ranked by the dot product of the student's own vectors. That is cheaper than retrieval from the whole collection and its
figures are higher; they compare students of one run, and with nothing else. With a sparsity budget, a student within 10% of it on
the pool's texts is preferred to any that is not. Only the first process measures; the others wait for its figures.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ir_measures
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from sparsekd.artifact import IntegrityError, checksum_of_file, fsync_path, temporary_name
from sparsekd.collection.beir import Collection
from sparsekd.recipe import Training
from sparsekd.training import ranks
from sparsekd.training.budget import TOLERANCE, Probe, saved_attributes

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder

logger = logging.getLogger(__name__)

FirstStage = Callable[[Sequence[str], int], Sequence[Sequence[str]]]
"""(query texts, depth) -> each query's best passage_ids, at most depth."""

_CHUNK = 64  # vectors held dense at once: 8 MB at 30,522 terms
_PROBED_PASSAGES = 128  # over whole collections such a sample gave 119.6 for 120 and 200.4 for 200
_PROBED_QUERIES = 512  # short and long queries differ more: half of one sample of 128 had 30 active dims, the other half 41
_PROBED_OFTEN = 96


@dataclass(frozen=True)
class DevPool:
    """Which passages are ranked for which dev queries."""

    queries: dict[str, str]
    """query_id -> text."""
    passages: dict[str, str]
    """passage_id -> text of every passage of some query's pool."""
    pool: dict[str, list[str]]
    """query_id -> passage_ids, ascending."""
    qrels: dict[str, dict[str, int]]
    """query_id -> passage_id -> grade."""


@dataclass(frozen=True)
class DevFigures:
    """What one measurement found."""

    ndcg: float
    query_active_dims: float
    passage_active_dims: float


def dev_pool(training: Training, collection: Collection, first_stage: FirstStage) -> DevPool:
    """Return the pool of ``dev_queries`` dev queries, those of smallest sha256(query_id): judged passages and ``dev_depth`` of
    the first stage's each. ValueError if the collection has no dev judgements.
    """
    judged = collection.qrels.get("dev")
    if not judged:
        there = ", ".join(collection.qrels)
        raise ValueError(
            f"[training] dev_steps = {training.dev_steps}: the collection has no dev judgements (splits: {there}); add "
            "qrels/dev.tsv, or remove dev_steps"
        )
    chosen = heapq.nsmallest(training.dev_queries, judged, key=lambda query_id: hashlib.sha256(query_id.encode("utf-8")).digest())
    found = first_stage([collection.queries[query_id] for query_id in chosen], training.dev_depth)
    pool = {query_id: sorted({*judged[query_id], *ids}) for query_id, ids in zip(chosen, found, strict=True)}
    needed = {passage_id for ids in pool.values() for passage_id in ids}
    return DevPool(
        queries={query_id: collection.queries[query_id] for query_id in chosen},
        passages={passage_id: text for passage_id, text in collection.passages.items() if passage_id in needed},
        pool=pool,
        qrels={query_id: {passage_id: max(0, grade) for passage_id, grade in judged[query_id].items()} for query_id in chosen},
    )


def measure_pool(model: SparseEncoder, dev: DevPool) -> DevFigures:
    """Return nDCG@10 of the pool ranked by student_sim, ties by passage_id, and mean active dims of its texts.

    nDCG as in trec_eval: linear gain, mean over the pool's queries. Encodes each text once; holds the vectors sparse.
    """
    query_vectors, passage_vectors = (encode_sparse(model, list(texts.values()), role) for role, texts in _texts(dev))
    places = {passage_id: place for place, passage_id in enumerate(dev.passages)}
    run = {}
    for row, (query_id, passage_ids) in enumerate(dev.pool.items()):
        chosen = passage_vectors.index_select(0, torch.tensor([places[passage_id] for passage_id in passage_ids]))
        scores = torch.mv(chosen, query_vectors[row].to_dense()).tolist()
        order = sorted(range(len(scores)), key=lambda place: (-scores[place], passage_ids[place]))
        # Minus the rank as the score: trec_eval breaks ties by passage_id descending and would not see our order.
        run[query_id] = {passage_ids[place]: -float(rank) for rank, place in enumerate(order, start=1)}
    evaluator = ir_measures.pytrec_eval.evaluator([ir_measures.nDCG @ 10], dev.qrels)
    (ndcg,) = evaluator.calc_aggregate(run).values()
    dims = [float(vectors._nnz()) / max(len(vectors), 1) for vectors in (query_vectors, passage_vectors)]
    return DevFigures(float(ndcg), *dims)


def encode_sparse(model: SparseEncoder, texts: Sequence[str], role: str) -> torch.Tensor:
    """Return sparse COO [n, V] on CPU: what encode_query or encode_document gives for ``texts``, ``role`` query or passage.

    Leaves the model in the mode it was in and draws no random number.
    """
    encode = model.encode_query if role == "query" else model.encode_document
    was_training = model.training
    parts = []
    try:
        for start in range(0, len(texts), _CHUNK):
            chunk = encode(list(texts[start : start + _CHUNK]), convert_to_sparse_tensor=False, show_progress_bar=False)
            parts.append(chunk.float().cpu().to_sparse())
    finally:
        model.train(was_training)
    return torch.cat(parts).coalesce()


def sample_probe(model: SparseEncoder, collection: Collection) -> Probe:
    """Return the probe of train queries and of passages, those of smallest hash. The first process measures for all."""
    train = {query_id: collection.queries[query_id] for query_id in collection.qrels.get("train", {})}
    queries, passages = _sample(train, _PROBED_QUERIES), _sample(collection.passages, _PROBED_PASSAGES)

    def measure(*samples: tuple[str, list[str]]) -> list[float]:
        found = None
        if ranks.is_first():
            found = [float(encode_sparse(model, texts, role)._nnz()) / len(texts) for role, texts in samples]
        return ranks.from_first(found) or []

    def both() -> tuple[float, float]:
        query_dims, passage_dims = measure(("query", queries), ("passage", passages))
        return query_dims, passage_dims

    return Probe(few_queries=lambda: measure(("query", queries[:_PROBED_OFTEN]))[0], both=both)


class DevSelection(TrainerCallback, ExportableState):
    """Measures every ``every`` steps and after the last, keeps the best weights in ``folder`` and puts them back at the end.

    Better is: within the budget first, then nDCG@10; of equals the earlier. Figures go into ``state.log_history`` as
    ``dev_nDCG@10``, ``dev_query_active_dims`` and ``dev_passage_active_dims``. Resumable: a checkpoint says which step was best,
    and the weights of that step stay on disk as long as one does. ``best_step`` is None until something was measured.
    """

    def __init__(
        self,
        model: SparseEncoder,
        dev: DevPool | None,
        *,
        every: int,
        folder: Path,
        query_budget: float | None = None,
        passage_budget: float | None = None,
    ) -> None:
        """``dev`` is needed in the first process only."""
        self.model = model
        self.dev = dev
        self.every = every
        self.folder = folder
        self.budgets = {"query": query_budget, "passage": passage_budget}
        self.best_step: int | None = None
        self.best: dict[str, Any] = {}
        """nDCG@10, active dims of both sides, is_within_budget, and the checksum of the weights' file."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"best_step": self.best_step, "best": dict(self.best)}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take up the saved state if the run is resumed."""
        if state.global_step > 0:
            saved = saved_attributes(self, state)
            self.best_step, self.best = saved["best_step"], dict(saved["best"])
        elif self.dev is not None:
            logger.info(
                "dev: %d queries, judged passages and the first stage's best, %.0f per query, %d in all, reranked every %d steps: "
                "comparable within this run only",
                len(self.dev.pool),
                sum(map(len, self.dev.pool.values())) / len(self.dev.pool),
                len(self.dev.passages),
                self.every,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if it is time, and keep the student if it is the best so far."""
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        figures = ranks.from_first(self._measured())
        assert figures is not None  # the first process always measures
        dims = {"query": figures.query_active_dims, "passage": figures.passage_active_dims}
        is_within = all(budget is None or abs(dims[side] / budget - 1) <= TOLERANCE for side, budget in self.budgets.items())
        logged = {"dev_nDCG@10": figures.ndcg, **{f"dev_{side}_active_dims": value for side, value in dims.items()}}
        state.log_history.append({**logged, "epoch": state.epoch, "step": state.global_step})
        is_best = (is_within, figures.ndcg) > (self.best.get("is_within_budget", False), self.best.get("nDCG@10", -1.0))
        logger.info(
            "step %d: dev nDCG@10 %.4f, active dims %.1f query, %.1f passage%s%s",
            state.global_step,
            figures.ndcg,
            *dims.values(),
            "" if is_within else ", outside the budget",
            "; the best so far" if is_best else "",
        )
        if is_best:
            checksum = ranks.from_first(self._keep(state.global_step) if ranks.is_first() else None)
            self.best_step = state.global_step
            self.best = {"nDCG@10": figures.ndcg, **dims, "is_within_budget": is_within, "checksum": checksum}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove weights that neither this run nor a checkpoint would go back to."""
        if not ranks.is_first():
            return
        named = {self.best_step}
        for path in Path(str(args.output_dir)).glob(f"checkpoint-*/{TRAINER_STATE_NAME}"):
            saved: Any = TrainerState.load_from_json(str(path)).stateful_callbacks
            named.add(saved.get(type(self).__name__, {}).get("attributes", {}).get("best_step"))
        keep = {self._file(step) for step in named if step is not None}
        for path in self.folder.glob("best-*"):
            if path not in keep:
                path.unlink()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the best student's weights into the model, unless the run was stopped before its end."""
        if state.global_step >= state.max_steps:
            self.restore(state.global_step)

    def restore(self, last_step: int | None = None) -> None:
        """Put the best weights into the model of every process; IntegrityError if their file has changed."""
        from safetensors.torch import load_model

        if self.best_step is None or self.best_step == last_step:
            return
        if ranks.is_first():
            path = self._file(self.best_step)
            if not path.is_file() or checksum_of_file(path) != self.best["checksum"]:
                what = "has changed" if path.is_file() else "is missing"
                raise IntegrityError(f"{path}: {what}; these are the best weights; remove {self.folder} and rerun")
            load_model(self.model, str(path))
        ranks.share_first([*self.model.parameters(), *self.model.buffers()])
        logger.info("dev: the student of step %d is kept, nDCG@10 %.4f", self.best_step, self.best["nDCG@10"])

    def _measured(self) -> DevFigures | None:
        if not ranks.is_first():
            return None
        assert self.dev is not None
        return measure_pool(self.model, self.dev)

    def _keep(self, step: int) -> str:
        from safetensors.torch import save_model

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._file(step)
        temporary = path.with_name(temporary_name(path.name))
        save_model(self.model, str(temporary))
        fsync_path(temporary)
        temporary.replace(path)
        fsync_path(self.folder)
        return checksum_of_file(path)

    def _file(self, step: int) -> Path:
        return self.folder / f"best-{step}.safetensors"


def _texts(dev: DevPool) -> list[tuple[str, Mapping[str, str]]]:
    return [("query", dev.queries), ("passage", dev.passages)]


def _sample(texts: Mapping[str, str], limit: int) -> list[str]:
    ids = heapq.nsmallest(limit, texts, key=lambda text_id: hashlib.sha256(text_id.encode("utf-8")).digest())
    return [texts[text_id] for text_id in ids]
