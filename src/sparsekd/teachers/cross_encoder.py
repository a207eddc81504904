"""A cross-encoder as a Scorer: the raw logit of each (query, passage) pair, float32, no activation.

sentence-transformers loads the model; tokenising, batching and cutting are ours. The model runs without padding and computes its
last layer for the pooled token only, where its architecture allows. A pair over the limit loses the end of its passage, never of
its query, and is counted. A checkpoint without a trained head, which transformers would load with a random one, is refused.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.model_reference import resolve
from sparsekd.recipe import Run, Teacher
from sparsekd.teachers.batching import TokenBudget, forward_batches, forward_tokens
from sparsekd.teachers.finite import require_finite
from sparsekd.teachers.identity import teacher_identity
from sparsekd.teachers.loading import length_limit, model_arguments, require_unchanged
from sparsekd.teachers.pair_tokens import PairTokenizer, PairTokens

_log = logging.getLogger(__name__)
Forward = Callable[[PairTokens, NDArray[np.int64]], Callable[[], NDArray[np.float32]]]


class CrossEncoderScorer:
    """Scores pairs in token-budget batches of near-equal length; implements Scorer."""

    def __init__(self, teacher: Teacher, run: Run) -> None:
        self.identity: dict[str, Any] = teacher_identity(teacher)
        self._teacher = teacher
        self._run = run
        self._model: tuple[PairTokenizer, Forward, TokenBudget] | None = None

    @property
    def num_truncated(self) -> int:
        """Pairs cut to the length limit since the scorer was made."""
        return 0 if self._model is None else self._model[0].num_truncated

    def score(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Return float32 [n] logits in input order.

        Passages are cut where a pair exceeds the limit, counted in ``num_truncated``. Raises ValueError if a query alone leaves
        no room for a passage, or if a score is not finite, naming how many and the first.
        """
        return self.score_tokens(self.tokenize(pairs), lambda _: None) if pairs else np.empty(0, dtype=np.float32)

    def tokenize(self, pairs: Sequence[tuple[str, str]]) -> PairTokens:
        """Return the tokens of these pairs, prompts put before the texts; loads the model at the first call.

        For one thread at a time, which may be another than the one that scores.
        """
        tokenizer, _, _ = self._loaded()
        before, (query, passage) = tokenizer.num_truncated, (self._teacher.query_prompt, self._teacher.passage_prompt)
        prompted = [(query + text, passage + other) for text, other in pairs] if query or passage else pairs
        tokens = tokenizer(prompted)
        if tokenizer.num_truncated and not before:
            _log.warning("teacher %s: pairs over %s tokens lose the end of their passage", self._teacher.name, tokenizer.limit)
        return tokens

    def score_tokens(self, tokens: PairTokens, done: Callable[[int], object]) -> NDArray[np.float32]:
        """Return float32 [n]: the logits of tokenized pairs; ``done`` is told how many, batch by batch.

        Where memory runs out, half as many tokens per forward pass are tried, and kept to. Raises ValueError if a score is not
        finite.
        """
        _, forward, budget = self._loaded()
        gold_sim_N = forward_batches(lambda batch: forward(tokens, batch), tokens.lengths, budget, done)
        expected = f'finite logits from {self._teacher.dtype} weights; try dtype = "float32"'
        require_finite(self._teacher.name, tokens.pairs, gold_sim_N, expected)
        return gold_sim_N

    def _loaded(self) -> tuple[PairTokenizer, Forward, TokenBudget]:
        if self._model is None:
            self._model = self._load()
        return self._model

    def _load(self) -> tuple[PairTokenizer, Forward, TokenBudget]:
        arguments = model_arguments(self._teacher, self._run)  # first: a wrong device is refused before the slow import
        import torch
        from sentence_transformers import CrossEncoder

        folder = resolve(self._teacher.model).path
        if self._teacher.backend == "openvino":  # takes float32 weights and rounds where it multiplies
            arguments["model_kwargs"] |= {"dtype": torch.float32}
        model = CrossEncoder(str(folder), activation_fn=torch.nn.Identity(), **arguments)
        require_unchanged(self._teacher.model, self.identity)
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
        tokenizer = PairTokenizer(model.tokenizer, length_limit(model, self._teacher), self._teacher.name)
        budget = TokenBudget(forward_tokens(self._run.batch_tokens, model.device.type))
        return tokenizer, self._forward(model.eval(), tokenizer.has_types), budget

    def _forward(self, model: Any, has_types: bool) -> Forward:
        if self._teacher.backend == "openvino":
            return _exported(model[0], self._teacher, self._run, has_types)
        from sparsekd.teachers.pooled_token import pack

        reason: str | None = "[run] packed = false"
        if self._run.packed:
            reason = pack(model[0]) if len(model) == 1 else "it has modules after its classifier"
        if reason is None:
            return _packed(model[0])
        _log.info("teacher %s: with padding: %s", self._teacher.name, reason)
        return _padded(model)

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


def _exported(transformer: Any, teacher: Teacher, run: Run, has_types: bool) -> Forward:
    from sparsekd.teachers.openvino_model import OpenVINOClassifier

    classifier = OpenVINOClassifier(transformer, teacher, run, has_types=has_types and _takes_types(transformer.model))

    def forward(tokens: PairTokens, batch: NDArray[np.int64]) -> Callable[[], NDArray[np.float32]]:
        scores = classifier(tokens, batch)
        return lambda: scores

    return forward


def _packed(transformer: Any) -> Forward:
    import torch

    from sparsekd.teachers.pooled_token import packed_logits, position_offset

    model, offset = transformer.model, position_offset(transformer)
    takes_types = _takes_types(model)

    def forward(tokens: PairTokens, batch: NDArray[np.int64]) -> Callable[[], NDArray[np.float32]]:
        ids, types = tokens.flat(batch)
        ids_T = _moved(torch.from_numpy(ids), model.device)
        types_T = _moved(torch.from_numpy(types), model.device) if takes_types and types is not None else None
        with torch.inference_mode():
            logits = packed_logits(model, ids_T, types_T, tokens.lengths[batch].tolist(), offset)
        return lambda: _scores(logits)

    return forward


def _padded(model: Any) -> Forward:
    import torch

    # pad() of a fast tokenizer advises to pad in __call__, which cannot sort by length first.
    model.tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True

    def forward(tokens: PairTokens, batch: NDArray[np.int64]) -> Callable[[], NDArray[np.float32]]:
        ends = tokens.lengths[batch].cumsum()[:-1]
        parts = zip(("input_ids", "token_type_ids"), tokens.flat(batch), strict=True)
        rows = {name: [row.tolist() for row in np.split(part, ends)] for name, part in parts if part is not None}
        features = model.tokenizer.pad(rows, padding=True, return_tensors="pt")
        with torch.inference_mode():
            logits = model({name: _moved(tensor, model.device) for name, tensor in features.items()})["scores"]
        return lambda: _scores(logits)

    return forward


def _takes_types(model: Any) -> bool:
    """Tell whether a model reads the token types that its tokenizer may give: DistilBERT does not."""
    return "token_type_ids" in inspect.signature(model.forward).parameters


def _moved(tensor: Any, device: Any) -> Any:
    """Copy to the device; to a GPU from pinned memory, so that nothing waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _scores(logits: Any) -> NDArray[np.float32]:
    scores: NDArray[np.float32] = logits.float().reshape(-1).cpu().numpy()
    return scores
