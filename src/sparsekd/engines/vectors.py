"""What a writer reads: a student's passage vectors block by block, its terms, and vectors of queries where they are asked for.

Weights must be finite and at least 0, as every inverted index takes them; a stored 0 is no active dim. V dims.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparsekd.collection.reading import shown

if TYPE_CHECKING:
    import scipy.sparse

Dims = NDArray[np.int32]
Weights = NDArray[np.float32]


class Row(NamedTuple):
    """A text's active dims, ascending, and their weights, all above 0."""

    text_id: str
    dims: Dims
    weights: Weights


@dataclass(frozen=True, eq=False)
class Vectors:
    """Vectors of texts, CSR float32 blocks of V columns in the order of ``text_ids``; ``blocks`` may be iterated more than once."""

    text_ids: Sequence[str]
    blocks: Iterable[scipy.sparse.csr_matrix]

    def rows(self, dimension: int) -> Iterator[Row]:
        """Yield one row per text.

        Raises ValueError if a block has not ``dimension`` columns, a weight is not finite or below 0, or there are not as many
        rows as ids.
        """
        place = 0
        for block in self.blocks:
            if block.shape[1] != dimension:
                raise ValueError(
                    f"vectors of {block.shape[1]} dims for an index of {dimension}: they are another student's; encode with the "
                    "student of the index"
                )
            self._check(block, place)
            block = block.sorted_indices()
            block.eliminate_zeros()
            for row in range(block.shape[0]):
                part = slice(block.indptr[row], block.indptr[row + 1])
                yield Row(self._id(place), block.indices[part], block.data[part])
                place += 1
        if place != len(self.text_ids):
            raise ValueError(f"vectors: {place} rows for {len(self.text_ids)} ids; expected one each")

    def _id(self, place: int) -> str:
        if place >= len(self.text_ids):
            raise ValueError(f"vectors: more rows than the {len(self.text_ids)} ids; expected one each")
        return self.text_ids[place]

    def _check(self, block: scipy.sparse.csr_matrix, first: int) -> None:
        bad = np.flatnonzero(~(np.isfinite(block.data) & (block.data >= 0)))
        if bad.size:
            row = int(np.searchsorted(block.indptr, bad[0], side="right")) - 1
            raise ValueError(
                f"text {shown(self._id(first + row))}: {bad.size} weights of its block are not finite or below 0 (first: "
                f"{block.data[bad[0]]}); expected at least 0: an inverted index holds nothing else; check the student"
            )


@dataclass(frozen=True, eq=False)
class Source:
    """What an export is made of: ``terms`` by dim, None where dims are no terms (CSR), and queries if they were asked for."""

    passages: Vectors
    dimension: int
    terms: Sequence[str] | None
    queries: Vectors | None = None
