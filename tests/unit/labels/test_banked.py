from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from sparsekd.bank.scores import ScoreBank
from sparsekd.bank.text_key import text_keys
from sparsekd.collection.beir import Collection
from sparsekd.labels.banked import BankedScores


def test_scores_are_found_by_content_in_the_order_asked_and_nan_where_unknown(tmp_path: Path) -> None:
    scores = ScoreBank(tmp_path).open({"teacher": "t"})
    scores.append(text_keys(["what", "what"]), text_keys(["this", "that"]), np.array([1.0, 2.0], dtype=np.float32))
    collection = Collection({"p0": "that", "p1": "this", "p2": "other"}, {"q0": "what", "q1": "why"}, {}, {})

    gold_sim = BankedScores(collection, {"judge": scores})("judge", ["q0", "q0", "q0", "q1"], ["p0", "p1", "p2", "p0"])

    np.testing.assert_array_equal(gold_sim, np.array([2.0, 1.0, np.nan, np.nan], dtype=np.float32))


def test_labels_import_no_torch_and_no_search_library() -> None:
    modules = ("banked", "building", "calibration", "conversions", "rows", "score_table", "vectors")
    code = f"import sys, {', '.join(f'sparsekd.labels.{module}' for module in modules)}; print(*sys.modules)"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert not {"torch", "transformers", "datasets", "faiss", "bm25s"} & set(loaded)
