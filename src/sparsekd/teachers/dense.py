"""A dense bi-encoder as an Encoder: sentence-transformers does the model, this does prompts, batches, limits and refusals.

The model is loaded at the first text that needs it and runs without padding where it can. Vectors are what the model's own modules
give: normalised only if it has a module for that, compared by the similarity it declares. Prompts are the recipe's, never the
model's own in silence.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.model_reference import resolve
from sparsekd.recipe import EncoderSpec, Run
from sparsekd.teachers.batching import forward_tokens, length_batches
from sparsekd.teachers.identity import encoder_identity
from sparsekd.teachers.loading import length_limit, model_arguments, require_unchanged
from sparsekd.teachers.protocols import Role, Similarity
from sparsekd.teachers.similarity import pairwise_similarity

_log = logging.getLogger(__name__)
_CONFIGURED_PROMPTS = {"query": ("query",), "passage": ("document", "passage", "corpus")}


class DenseEncoder:
    """Encodes texts in token-budget batches of near-equal length; implements Encoder."""

    def __init__(self, spec: EncoderSpec, run: Run) -> None:
        self.identity: dict[str, Any] = encoder_identity(spec)
        self.reference = spec.model
        self.similarity: Similarity = self.identity["similarity"]
        self.num_truncated = 0
        self._spec = spec
        self._run = run
        self._model: Any = None
        self._limit: int | None = None
        self._without_padding = contextlib.ExitStack()  # never left: the model is this object's own

    @property
    def dimension(self) -> int:
        """Width of a vector; loads the model."""
        return int(self._loaded().get_embedding_dimension())

    def encode(self, texts: Sequence[str], *, role: Role) -> NDArray[np.float32]:
        """Return float32 [n, D] in input order.

        Texts longer than the limit are cut by the model and counted in ``num_truncated``. Raises ValueError if a vector is not
        finite, naming how many and the first.
        """
        model = self._loaded()
        prompt = self.identity[f"{role}_prompt"]
        vectors_ND = np.empty((len(texts), self.dimension), dtype=np.float32)
        lengths = self._token_lengths([prompt + text for text in texts])
        encoded = []
        for batch in length_batches(lengths, forward_tokens(self._run.batch_tokens, model.device.type)):
            inputs = [texts[position] for position in batch]
            # prompt="" means none: left out, the model's default_prompt_name would apply.
            vectors = model.encode(inputs, prompt=prompt, batch_size=len(inputs), convert_to_tensor=True, show_progress_bar=False)
            encoded.append((batch, vectors))
        for batch, vectors in encoded:  # copied once all are queued: a copy per batch would make a GPU wait for each
            vectors_ND[batch] = vectors.float().cpu().numpy()
        self._refuse_non_finite(vectors_ND, texts, role)
        return vectors_ND

    def score_vectors(self, query_vectors: NDArray[np.float32], passage_vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return float32 [n]: the model's own similarity of row i with row i."""
        return pairwise_similarity(self.similarity, query_vectors, passage_vectors)

    def _token_lengths(self, texts: list[str]) -> NDArray[np.int64]:
        """Count tokens, special ones included, cut at the limit; what is cut is counted."""
        if not texts:
            return np.empty(0, dtype=np.int64)
        tokens = self._loaded().tokenizer(texts, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
        lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
        if self._limit is None:
            return lengths
        num_truncated = int((lengths > self._limit).sum())
        if num_truncated and not self.num_truncated:
            _log.warning("encoder %s: texts over %d tokens are cut by the model and counted", self._spec.model, self._limit)
        self.num_truncated += num_truncated
        return np.minimum(lengths, self._limit)

    def _loaded(self) -> Any:
        if self._model is None:
            self._model = self._load()
        return self._model

    def _load(self) -> Any:
        arguments = model_arguments(self._spec, self._run)  # first: a wrong device is refused before the slow import
        from sentence_transformers import SentenceTransformer
        from transformers import PreTrainedTokenizerBase

        from sparsekd.packed_body import packed

        model = SentenceTransformer(str(resolve(self._spec.model).path), **arguments)
        require_unchanged(self._spec.model, self.identity)
        if not isinstance(model.tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                f"model {self._spec.model!r}: its tokenizer is a {type(model.tokenizer).__name__}; "
                "expected a transformers model, whose texts can be measured in tokens"
            )
        self._limit = length_limit(model, self._spec)
        if self._spec.max_length is not None:
            model.max_seq_length = self._spec.max_length
        self._warn_of_unused_prompts(model.prompts, model.default_prompt_name)
        if self._run.packed:
            self._without_padding.enter_context(packed(model))
        return model.eval()

    def _warn_of_unused_prompts(self, prompts: dict[str, str | None], default_name: str | None) -> None:
        for role, names in _CONFIGURED_PROMPTS.items():
            configured = {name: prompts[name] for name in (*names, default_name) if name and prompts.get(name)}
            if configured and not self.identity[f"{role}_prompt"]:
                _log.warning(
                    "encoder %s: the model configures %s, but the recipe has no %s_prompt, so none is used; set it to use one",
                    self._spec.model,
                    ", ".join(f"the {name} prompt {text!r}" for name, text in configured.items()),
                    role,
                )

    def _refuse_non_finite(self, vectors_ND: NDArray[np.float32], texts: Sequence[str], role: Role) -> None:
        bad = np.flatnonzero(~np.isfinite(vectors_ND).all(axis=1))
        if len(bad):
            raise ValueError(
                f"encoder {self._spec.model!r}: {len(bad)} of {len(texts)} {role} vectors are not finite "
                f"(first: text {bad[0]}, {texts[bad[0]][:80]!r}); expected finite values from {self._spec.dtype} weights; "
                'try dtype = "float32"'
            )
