"""A saved student as something that encodes texts: any SparseEncoder folder, trained here or elsewhere.

What it is (digests of its folder) is known without torch; the model is loaded by the first text. A student that declares the
cosine gives vectors of unit length, so that the dot product is its similarity whatever it declares.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sparsekd.device import prepare_device
from sparsekd.model_reference import weights_identity
from sparsekd.recipe import Run
from sparsekd.teachers.batching import BLOCK

if TYPE_CHECKING:
    import scipy.sparse
    from sentence_transformers import SparseEncoder

Role = Literal["query", "passage"]
TEXTS = BLOCK
"""Texts encoded at once."""

_CONFIG = "config_sentence_transformers.json"


class StudentEncoder:
    """The student saved in a folder."""

    def __init__(self, folder: Path, run: Run) -> None:
        """Look at the folder; ValueError if it holds no SparseEncoder, or weights that cannot be digested."""
        self.folder = folder
        self._run = run
        config = folder / _CONFIG
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
        if kind != "SparseEncoder" or not (folder / "modules.json").is_file():
            found = kind or f"no model_type in {_CONFIG}"
            raise ValueError(
                f"student {folder}: holds {found}; expected a saved SparseEncoder, whose "
                "modules.json says how token weights become one vector; save it once as a SparseEncoder"
            )

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """{relative file: sha256} of what decides the vectors; lengths and prompts stand in these files."""
        return weights_identity(self.folder)

    @functools.cached_property
    def terms(self) -> list[str] | None:
        """The distinct term of each dim, in order; None where dims are no terms (an autoencoder's). Loads the model."""
        from sparsekd.evaluation.vocabulary import dim_terms, distinct
        from sparsekd.training.rows import dims_are_terms

        return distinct(dim_terms(self._model)) if dims_are_terms(self._model) else None

    @property
    def num_dims(self) -> int:
        """Width V of a vector. Loads the model."""
        num_dims: int = self._model.get_embedding_dimension() or 0
        return num_dims

    @property
    def has_unit_length(self) -> bool:
        """Whether vectors are divided by their length, as the cosine asks. Loads the model."""
        return bool(self._model.similarity_fn_name == "cosine")

    def encode(self, texts: Sequence[str], *, role: Role) -> scipy.sparse.csr_matrix:
        """Return float32 CSR [n, V] in input order, indices sorted, no stored zeros; ValueError if a weight is not finite."""
        import scipy.sparse

        nothing = scipy.sparse.csr_matrix((0, self.num_dims), dtype=np.float32)  # no texts have a width too
        return scipy.sparse.vstack([nothing, *self.encode_blocks(texts, role=role, total=len(texts))], format="csr")

    def encode_blocks(self, texts: Iterable[str], *, role: Role, total: int) -> Iterator[scipy.sparse.csr_matrix]:
        """Yield the same of one block of texts after another, one block in memory at a time; ``total`` texts are announced."""
        from sparsekd.evaluation.student import encoded_blocks, of_unit_length

        run, model = self._run, self._model
        how: dict[str, Any] = {"batch_tokens": run.batch_tokens, "fused": run.fused_head, "packed": run.packed}
        for vectors in encoded_blocks(model, _blocks(texts), role=role, total=total, **how):
            found = of_unit_length(vectors) if self.has_unit_length else vectors
            found.eliminate_zeros()
            found.sort_indices()
            yield found

    @functools.cached_property
    def _model(self) -> SparseEncoder:
        device = prepare_device(self._run)
        from sentence_transformers import SparseEncoder

        return SparseEncoder(str(self.folder), device=device, local_files_only=True).eval()


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(texts)
    while block := list(itertools.islice(remaining, TEXTS)):
        yield block
