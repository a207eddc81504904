"""A student's index over a collection: postings in blocks of passages, memory-mapped; exact search, and what made a score.

A published folder. ``passage_ids.txt``: one a line, in corpus order. ``id_rank.npy``, int32: their places in ascending order.
``offsets.npy``, int64: where each passage's line begins in corpus.jsonl. ``vocabulary.json``: terms by dim, or null.
``blocks/N.{starts,passages,weights}.npy``: for each dim the passages of block N that have it, ascending, and their weights, 8 bytes
a posting. Vectors score by the dot product. Opening reads every byte once to compare checksums; search holds 4 bytes per passage of
one block, and ids. P passages, V dims, Q queries, K search depth.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.artifact import Artifact, IntegrityError, find, read_manifest, verify
from sparsekd.mining.ranking import Positions, Scores, empty_block
from sparsekd.mining.sparse import search_postings

if TYPE_CHECKING:
    import scipy.sparse

KIND = "index"
IDS, ID_RANK, OFFSETS, VOCABULARY = "passage_ids.txt", "id_rank.npy", "offsets.npy", "vocabulary.json"
POSTINGS = ("starts", "passages", "weights")


@dataclass(frozen=True)
class StudentIndex:
    """One student's vectors of one collection's passages."""

    artifact: Artifact
    passage_ids: list[str]
    """In corpus order; a position counts from 0 in it."""
    terms: list[str] | None
    """The distinct term of each dim; None where dims are no terms."""

    @classmethod
    def open(cls, folder: Path) -> StudentIndex:
        """Open a published index; IntegrityError naming the file if it is missing or a byte of it changed."""
        manifest = read_manifest(folder)
        if manifest.get("kind") != KIND:
            raise ValueError(f"{folder}: holds a {manifest.get('kind')}; expected an index, as sparsekd search makes it")
        artifact = find(folder, manifest["fields"])
        assert artifact is not None, folder
        verify(artifact)
        passage_ids = (folder / IDS).read_text(encoding="utf-8").splitlines()
        terms = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
        return cls(artifact, passage_ids, terms)

    @property
    def num_dims(self) -> int:
        """Width V of the vectors."""
        return int(self.artifact.manifest["num_dims"])

    @property
    def student(self) -> dict[str, str]:
        """{relative file: sha256} of the student that made it."""
        return dict(self.artifact.manifest["fields"]["student"])

    @property
    def corpus_digest(self) -> dict[str, str]:
        """{file of the collection: sha256} of what was indexed."""
        return dict(self.artifact.manifest["fields"]["collection"])

    @functools.cached_property
    def offsets(self) -> NDArray[np.int64]:
        """int64 [P]: the byte of corpus.jsonl where each passage's line begins."""
        return self._mapped(OFFSETS)

    @functools.cached_property
    def position_by_id(self) -> dict[str, int]:
        """Where each passage stands in corpus order."""
        return {passage_id: position for position, passage_id in enumerate(self.passage_ids)}

    def blocks(self) -> Iterator[tuple[int, scipy.sparse.csr_matrix]]:
        """Yield (position of the first passage, float32 CSR [passages of the block, V]), indices sorted, block after block."""
        for first, passages_VP in self.postings:
            yield first, passages_VP.T.tocsr()

    @functools.cached_property
    def postings(self) -> list[tuple[int, scipy.sparse.csr_matrix]]:
        """(position of the first passage, float32 CSR [V, passages of the block]) over the mapped files, block after block.

        Mapped once: mapping three files a block again made a single query over 100,000 passages take 16 times as long.
        """
        import scipy.sparse

        blocks, first = [], 0
        for number, num_passages in enumerate(self.artifact.manifest["block_passages"]):
            starts, passages, weights = (self._mapped(block_file(number, part)) for part in POSTINGS)
            blocks.append((first, scipy.sparse.csr_matrix((weights, passages, starts), shape=(self.num_dims, num_passages))))
            first += num_passages
        return blocks

    def search(self, query_csr: scipy.sparse.csr_matrix, depth: int) -> tuple[Positions, Scores]:
        """Return int32 [Q, K] positions (-1 filler) and float32 [Q, K] dot products, K = min(depth, P), ties by passage_id.

        Exact, and equal to a search over one block to the bit. Raises ValueError if the width is not the index's.
        """
        if query_csr.shape[1] != self.num_dims:
            raise ValueError(f"search: queries of {query_csr.shape[1]} dims in an index of {self.num_dims}; expected its student's")
        best = empty_block(query_csr.shape[0], min(depth, len(self.passage_ids)))
        for first, passages_VP in self.postings:
            search_postings(passages_VP, first, query_csr, self._id_rank, best)
        return best

    def weights(self, position: int, dims: NDArray[Any]) -> NDArray[np.float32]:
        """Return float32 [n]: what the passage weighs in each of ``dims``, 0 where it has none."""
        number, first = self._block_of(position)
        starts, passages, weights = (self._mapped(block_file(number, part)) for part in POSTINGS)
        found = np.zeros(len(dims), dtype=np.float32)
        for place, dim in enumerate(dims.tolist()):
            posting = slice(int(starts[dim]), int(starts[dim + 1]))
            within = int(np.searchsorted(passages[posting], position - first))
            if within < posting.stop - posting.start and passages[posting][within] == position - first:
                found[place] = weights[posting][within]
        return found

    @functools.cached_property
    def _id_rank(self) -> NDArray[np.int32]:
        return self._mapped(ID_RANK)

    def _block_of(self, position: int) -> tuple[int, int]:
        """Return a passage's block and the position of the first passage in it."""
        first = 0
        for number, num_passages in enumerate(self.artifact.manifest["block_passages"]):
            if position < first + num_passages:
                return number, first
            first += num_passages
        raise IndexError(f"position {position} of {len(self.passage_ids)} passages")

    def _mapped(self, name: str) -> NDArray[Any]:
        path = self.artifact.folder / name
        try:
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except ValueError as error:  # its checksum is sound, so another program wrote it
            raise IntegrityError(f"{path}: not an array ({error}); remove {self.artifact.folder} and rerun") from error


def block_file(number: int, part: str) -> str:
    """Return the file of one of a block's three arrays, relative to the index."""
    return f"blocks/{number:05}.{part}.npy"
