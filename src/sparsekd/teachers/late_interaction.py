"""Late interaction as a Scorer: MaxSim over the token vectors of a sentence-transformers MultiVectorEncoder.

gold_sim = Σ over query tokens of the largest dot product with a passage token (Khattab and Zaharia 2020, arXiv 2004.12832), divided
by the number of query tokens where the model declares ``meanmaxsim``. Texts are encoded once per block of pairs, and the latest are
kept within a budget of bytes: asked in order of passages, each passage is encoded once, whatever the number of queries. Only scores
are banked; token vectors of a collection would be a hundred times its dense vectors. Prompts are the recipe's.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.model_reference import resolve
from sparsekd.recipe import Run, Teacher
from sparsekd.teachers.batching import forward_tokens, length_batches
from sparsekd.teachers.finite import require_finite
from sparsekd.teachers.identity import teacher_identity
from sparsekd.teachers.loading import model_arguments, refuse_beyond_positions, require_unchanged
from sparsekd.teachers.protocols import Role

_log = logging.getLogger(__name__)

_Vectors = NDArray[np.float32]
_KEPT_BYTES = 1 << 27
"""Of each role, between blocks: 134 MB, 8,192 queries of 32 tokens at width 128. The block in hand comes on top of it."""


class LateInteractionScorer:
    """Encodes texts in token-budget batches of near-equal length and compares them pair by pair; implements Scorer."""

    def __init__(self, teacher: Teacher, run: Run) -> None:
        self.identity: dict[str, Any] = teacher_identity(teacher)
        self.num_truncated = 0
        self._teacher = teacher
        self._run = run
        self._model: Any = None
        self._kept: dict[Role, dict[str, _Vectors]] = {"query": {}, "passage": {}}
        self._without_padding = contextlib.ExitStack()  # never left: the model is this object's own

    def score(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Return float32 [n] in input order; a pair's score depends on the pairs around it by no more than rounding in the encoder.

        Texts longer than the model's limit for their role are cut by it and counted in ``num_truncated``. Raises ValueError if a
        text has no token that the model compares, or if a score is not finite.
        """
        if not pairs:
            return np.empty(0, dtype=np.float32)
        query_vectors = self._vectors([query for query, _ in pairs], "query")
        passage_vectors = self._vectors([passage for _, passage in pairs], "passage")
        is_mean = self.identity["similarity"] == "meanmaxsim"
        gold_sim_N = np.array(
            [_maxsim(query_vectors[query], passage_vectors[passage], is_mean) for query, passage in pairs], dtype=np.float32
        )
        expected = f'finite values from {self._teacher.dtype} weights; try dtype = "float32"'
        require_finite(self._teacher.name, pairs, gold_sim_N, expected)
        return gold_sim_N

    def _vectors(self, texts: list[str], role: Role) -> dict[str, _Vectors]:
        """Return the token vectors by text; encode those that are not kept, and keep the latest."""
        kept, wanted = self._kept[role], list(dict.fromkeys(texts))
        new = [text for text in wanted if text not in kept]
        encoded = dict(zip(new, self._encode(new, role), strict=True))
        found = {text: encoded[text] if text in encoded else kept.pop(text) for text in wanted}
        kept |= found  # to the end, where the latest stand
        size = sum(vectors.nbytes for vectors in kept.values())
        for text in list(kept):
            if size <= _KEPT_BYTES:
                break
            size -= kept.pop(text).nbytes
        return found

    def _encode(self, texts: list[str], role: Role) -> list[_Vectors]:
        """Return float32 [tokens, D] of each text, as the model's encode_query or encode_document gives them."""
        if not texts:
            return []
        model = self._loaded()
        prompt = self.identity[f"{role}_prompt"]
        encode = model.encode_query if role == "query" else model.encode_document
        lengths = self._token_lengths([prompt + text for text in texts], role)
        order, encoded = [], []
        for batch in length_batches(lengths, forward_tokens(self._run.batch_tokens, model.device.type)):
            inputs = [texts[position] for position in batch]
            # prompt="" means none: left out, the model's own prompt for the role would apply.
            encoded += encode(inputs, prompt=prompt, batch_size=len(inputs), show_progress_bar=False)
            order += batch.tolist()
        vectors: list[_Vectors] = [np.empty(0, dtype=np.float32)] * len(texts)
        for position, tokens in zip(order, encoded, strict=True):
            vectors[position] = tokens.float().cpu().numpy()
            if not len(tokens):
                raise ValueError(
                    f"teacher {self._teacher.name!r}: {role} {texts[position][:80]!r} has no token that the model "
                    "compares (its MultiVectorMask leaves all out), so MaxSim is undefined; take the text out of the collection"
                )
        return vectors

    def _token_lengths(self, texts: list[str], role: Role) -> NDArray[np.int64]:
        """Count tokens, special ones included, cut at the role's limit; what is cut is counted."""
        module = self._loaded()[0]
        tokens = module.tokenizer(texts, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
        lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
        limit, width = _limit(module, role)
        if limit is not None:
            num_truncated = int((lengths > limit).sum())
            if num_truncated and not self.num_truncated:
                _log.warning(
                    "teacher %s: %s texts over %d tokens are cut by the model and counted", self._teacher.name, role, limit
                )
            self.num_truncated += num_truncated
            lengths = np.minimum(lengths, limit)
        return np.maximum(lengths, width)

    def _loaded(self) -> Any:
        if self._model is None:
            self._model = self._load()
        return self._model

    def _load(self) -> Any:
        arguments = model_arguments(self._teacher, self._run)  # first: a wrong device is refused before the slow import
        from sentence_transformers import MultiVectorEncoder

        folder = resolve(self._teacher.model).path
        self._refuse_fresh_weights(folder)
        model = MultiVectorEncoder(str(folder), **arguments)
        require_unchanged(self._teacher.model, self.identity)
        if self._teacher.max_length is not None:
            refuse_beyond_positions(
                model, self._teacher.model, self._teacher.max_length, ", or no max_length for the limit it was saved with"
            )
            first: Any = model[0]
            first.document_length = self._teacher.max_length
        if self._run.packed:
            from sparsekd.packed_body import packed

            self._without_padding.enter_context(packed(model))
        return model.eval()

    def _refuse_fresh_weights(self, folder: Path) -> None:
        """Refuse a transformer without all its weights, which transformers fills with random ones; a pooler is never asked."""
        from transformers import AutoModel

        _, report = AutoModel.from_pretrained(
            str(folder),
            device_map="meta",  # reads names and shapes, allocates nothing
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=self._teacher.trust_remote_code,
        )
        missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
        if missing:
            raise ValueError(
                f"teacher {self._teacher.name!r}: {folder} lacks {len(missing)} weights ({', '.join(missing[:4])}), which would be "
                "drawn at random; expected a trained MultiVectorEncoder"
            )


def _limit(module: Any, role: Role) -> tuple[int | None, int]:
    """Return how many tokens of a text a Transformer reads (None: no limit), and the fewest it makes of one."""
    expansion = module.query_expansion if role == "query" else None
    width = expansion["length"] if expansion else 0
    if expansion and expansion["strategy"] == "fixed":
        return width, width
    own = module.query_length if role == "query" else module.document_length
    limit = own if own is not None else module.max_seq_length
    return (None if limit is None or limit > 1_000_000_000 else max(int(limit), width)), width


def _maxsim(query_TD: _Vectors, passage_SD: _Vectors, is_mean: bool) -> np.float32:
    """Return Σ over query tokens of the largest dot product with a passage token, or their mean; summed in float64."""
    largest_T = (query_TD @ passage_SD.T).max(axis=1).astype(np.float64)
    return np.float32(largest_T.mean() if is_mean else largest_T.sum())
