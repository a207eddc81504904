"""A cross-encoder as a Scorer: the raw logit of each (query, passage) pair, float32, no activation.

sentence-transformers loads the model; tokenising, batching and cutting are ours. A pair over the limit loses the end of its
passage, never of its query, and is counted. A checkpoint without a trained head, which transformers would load with a random
one, is refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.model_reference import resolve
from sparsekd.recipe import Run, Teacher
from sparsekd.teachers.batching import length_batches
from sparsekd.teachers.identity import teacher_identity
from sparsekd.teachers.loading import length_limit, model_arguments

_log = logging.getLogger(__name__)


class CrossEncoderScorer:
    """Scores pairs in token-budget batches of near-equal length; implements Scorer."""

    def __init__(self, teacher: Teacher, run: Run) -> None:
        self.identity: dict[str, Any] = teacher_identity(teacher)
        self.num_truncated = 0
        self._teacher = teacher
        self._run = run
        self._model: Any = None
        self._limit: int | None = None

    def score(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Return float32 [n] logits in input order.

        Passages are cut where a pair exceeds the limit, counted in ``num_truncated``. Raises ValueError if a query alone leaves
        no room for a passage, or if a score is not finite, naming how many and the first.
        """
        import torch

        gold_sim_N = np.empty(len(pairs), dtype=np.float32)
        if not pairs:
            return gold_sim_N
        model = self._loaded()
        features, lengths = self._tokenize(pairs)
        scored = []
        with torch.inference_mode():
            for batch in length_batches(lengths, self._run.batch_tokens):
                inputs = self._padded(features, batch)
                scored.append((batch, model({name: tensor.to(model.device) for name, tensor in inputs.items()})["scores"]))
        for batch, scores in scored:  # copied once all are queued: a copy per batch would make a GPU wait for each
            gold_sim_N[batch] = scores.float().reshape(-1).cpu().numpy()
        self._refuse_non_finite(gold_sim_N, pairs)
        return gold_sim_N

    def _tokenize(self, pairs: Sequence[tuple[str, str]]) -> tuple[dict[str, list[list[int]]], NDArray[np.int64]]:
        """Return each feature's lists of ids, cut to the limit, and their lengths."""
        tokenizer = self._loaded().tokenizer
        queries = [self._teacher.query_prompt + query for query, _ in pairs]
        passages = [self._teacher.passage_prompt + passage for _, passage in pairs]
        if self._limit is None:
            tokens = tokenizer(queries, passages, truncation=False, verbose=False)
        else:
            self._refuse_long_queries(queries)
            tokens = tokenizer(queries, passages, truncation="only_second", max_length=self._limit, verbose=False)
            # Only a pair that fills the limit can have been cut; its encoding keeps what was cut off.
            full = (position for position, ids in enumerate(tokens["input_ids"]) if len(ids) == self._limit)
            num_truncated = sum(bool(tokens.encodings[position].overflowing) for position in full)
            if num_truncated and not self.num_truncated:
                _log.warning("teacher %s: pairs over %d tokens lose the end of their passage", self._teacher.name, self._limit)
            self.num_truncated += num_truncated
        return dict(tokens), np.array([len(ids) for ids in tokens["input_ids"]], dtype=np.int64)

    def _padded(self, features: dict[str, list[list[int]]], batch: NDArray[np.int64]) -> dict[str, Any]:
        rows = {name: [values[position] for position in batch] for name, values in features.items()}
        return dict(self._loaded().tokenizer.pad(rows, padding=True, return_tensors="pt"))

    def _refuse_long_queries(self, queries: list[str]) -> None:
        limit = self._limit or 0
        unique = list(dict.fromkeys(queries))
        tokenizer = self._loaded().tokenizer
        tokens = tokenizer(unique, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        room = limit - tokenizer.num_special_tokens_to_add(pair=True)
        too_long = [(query, len(ids)) for query, ids in zip(unique, tokens, strict=True) if len(ids) >= room]
        if too_long:
            query, length = too_long[0]
            raise ValueError(
                f"teacher {self._teacher.name!r}: {len(too_long)} of {len(unique)} queries leave no room for a passage "
                f"(first: {length} tokens, {query[:80]!r}); expected fewer than {room} within the limit of {limit}; "
                "raise max_length, or shorten the query in the collection"
            )

    def _loaded(self) -> Any:
        if self._model is None:
            self._model = self._load()
        return self._model

    def _load(self) -> Any:
        arguments = model_arguments(self._teacher, self._run)  # first: a wrong device is refused before the slow import
        import torch
        from sentence_transformers import CrossEncoder

        folder = resolve(self._teacher.model).path
        model = CrossEncoder(str(folder), activation_fn=torch.nn.Identity(), **arguments)
        if model.num_labels != 1:
            raise ValueError(
                f"teacher {self._teacher.name!r}: {self._teacher.model} has {model.num_labels} labels; "
                "expected a cross-encoder with one, whose logit is the score"
            )
        first: Any = model[0]
        if first.transformer_task != "sequence-classification" or "message" in first.modality_config:
            raise ValueError(
                f"teacher {self._teacher.name!r}: {self._teacher.model} is a {first.transformer_task} model; "
                "expected a checkpoint with a sequence-classification head over text pairs; for a decoder say kind = \"causal-lm\""
            )
        self._refuse_fresh_weights(folder)
        self._limit = length_limit(model, self._teacher)
        # pad() of a fast tokenizer advises to pad in __call__, which cannot sort by length first.
        model.tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
        return model.eval()

    def _refuse_fresh_weights(self, folder: Path) -> None:
        """Refuse a checkpoint without the head's weights, which transformers fills with random ones and a line in the log."""
        from transformers import AutoModelForSequenceClassification

        listed = folder / "modules.json"
        modules = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else [{"path": ""}]
        checkpoint = folder / modules[0]["path"]
        _, report = AutoModelForSequenceClassification.from_pretrained(
            str(checkpoint),
            num_labels=1,
            device_map="meta",  # reads names and shapes, allocates nothing
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=self._teacher.trust_remote_code,
        )
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(
                f"teacher {self._teacher.name!r}: {checkpoint} lacks {len(missing)} weights ({', '.join(missing[:4])}), "
                'which would be drawn at random; expected a trained cross-encoder; for a bi-encoder say kind = "dense"'
            )

    def _refuse_non_finite(self, gold_sim_N: NDArray[np.float32], pairs: Sequence[tuple[str, str]]) -> None:
        bad = np.flatnonzero(~np.isfinite(gold_sim_N))
        if len(bad):
            query, passage = pairs[bad[0]]
            raise ValueError(
                f"teacher {self._teacher.name!r}: {len(bad)} of {len(pairs)} scores are not finite (first: pair {bad[0]}, "
                f"{query[:80]!r} with {passage[:80]!r}); expected finite logits from {self._teacher.dtype} weights; "
                'try dtype = "float32"'
            )
