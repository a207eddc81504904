from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparsekd.mining.ranking import NONE, best_first, empty_block, id_ranks, merged


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 8), st.data())
def test_blocks_over_two_parts_merge_into_the_block_over_the_whole(scores: list[int], depth: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(scores)))
    ids = data.draw(st.permutations([f"p{number}" for number in range(len(scores))]))
    id_rank, values = id_ranks(ids), np.array(scores, dtype=np.float32)

    def block(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positions_QK, scores_QK = empty_block(1, min(depth, len(positions)))
        best, best_scores = best_first(positions, values[positions], id_rank, depth)
        positions_QK[0, : len(best)], scores_QK[0, : len(best)] = best, best_scores
        return positions_QK, scores_QK

    everything = np.arange(len(scores))
    found = merged(block(everything[:cut]), block(everything[cut:]), id_rank, depth)

    whole = block(everything)
    np.testing.assert_array_equal(found[0], whole[0])
    np.testing.assert_array_equal(found[1], whole[1])


def test_fillers_never_push_a_passage_out() -> None:
    left = np.array([[4, NONE]], dtype=np.int32), np.array([[-2.0, 0.0]], dtype=np.float32)
    right = np.array([[7]], dtype=np.int32), np.array([[-9.0]], dtype=np.float32)

    positions_QK, scores_QK = merged(left, right, id_ranks([f"p{number}" for number in range(8)]), 3)

    assert positions_QK.tolist() == [[4, 7, NONE]]
    assert scores_QK.tolist() == [[-2.0, -9.0, 0.0]]
