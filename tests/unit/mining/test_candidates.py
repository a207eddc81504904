from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsekd.artifact import IntegrityError, key_of, read_manifest, write_manifest
from sparsekd.mining.candidates import COLLECTION_FILES, Candidates, candidates_fields, miner_names
from sparsekd.mining.miners import mine_candidates

DIGEST = dict.fromkeys(COLLECTION_FILES, "abc")
ENCODER = {"weights": "abc"}
MINING: dict[str, Any] = {
    "miners": [
        {"kind": "bm25", "quota": 3, "depth": 5},
        {"kind": "dense", "quota": 2, "depth": 6, "model": "some/encoder"},
    ],
    "filter": {"absolute_margin": 1.0},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    mining: dict[str, Any] = json.loads(json.dumps(MINING))
    place: Any = mining
    *parents, key = path.split(".")
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    place[key] = value
    return mining


def key(recipe: Any, digest: dict[str, str] = DIGEST, encoder: dict[str, str] = ENCODER) -> str:
    return key_of(candidates_fields(recipe, digest, [encoder]))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("miners.0.quota", 4),
        ("miners.0.depth", 6),
        ("miners.0.skip", 1),
        ("miners.0.k1", 1.2),
        ("miners.0.b", 0.75),
        ("miners.1.quota", 3),
        ("miners.1.skip", 1),
        ("filter.absolute_margin", 2.0),
        ("filter.relative_margin", 0.1),
        ("filter.percentile", 95.0),
        ("filter.near_duplicate", 0.9),
        ("max_positives", 2),
    ],
)
def test_what_changes_candidates_changes_the_key(make_recipe: Any, path: str, value: Any) -> None:
    assert key(make_recipe(changed(path, value))) != key(make_recipe(MINING))


@pytest.mark.parametrize("name", COLLECTION_FILES)
def test_another_collection_file_changes_the_key(make_recipe: Any, name: str) -> None:
    assert key(make_recipe(MINING), DIGEST | {name: "xyz"}) != key(make_recipe(MINING))


@pytest.mark.parametrize("limit", ["max_passages", "max_train_queries"])
def test_another_sample_changes_the_key(make_recipe: Any, limit: str) -> None:
    assert key(make_recipe(MINING, collection={"path": "somewhere", limit: 9})) != key(make_recipe(MINING))


def test_another_encoder_changes_the_key_and_another_reference_to_it_does_not(make_recipe: Any) -> None:
    moved = make_recipe(changed("miners.1.model", "/elsewhere/encoder"))

    assert key(moved) == key(make_recipe(MINING))
    assert key(make_recipe(MINING), encoder={"weights": "xyz"}) != key(make_recipe(MINING))


def test_paths_test_qrels_and_later_stages_keep_the_key(make_recipe: Any) -> None:
    other = make_recipe(
        MINING,
        collection={"path": "elsewhere"},
        labels={"num_negatives": 2},
        training={"seed": 1},
        run={"device": "cuda", "cache": "x"},
    )

    assert key(other, DIGEST | {"qrels/test.tsv": "xyz"}) == key(make_recipe(MINING))


def test_a_filter_by_a_teacher_does_not_enter_the_key(make_recipe: Any) -> None:
    by_teacher = make_recipe(changed("filter", {"by": "judge", "absolute_margin": 1.0}))
    unfiltered = make_recipe(changed("filter", {}))

    assert key(by_teacher) == key(unfiltered) != key(make_recipe(MINING))


def test_keys_of_candidates_are_those_they_have_always_been(make_recipe: Any) -> None:
    # As computed when there were margins, BM25 and exact dense search only; a change orphans every candidates folder there is.
    assert key(make_recipe(MINING)) == "99b8cc3d46d37e66"
    assert key(make_recipe({"miners": MINING["miners"]})) == "05225c28bf683ad2"


RANDOM = {"kind": "random", "quota": 2}
RUN = {"kind": "run", "quota": 2, "path": "a.run"}


@pytest.mark.parametrize("change", [{"seed": 1}, {"quota": 3}, {"depth": 7}])
def test_a_setting_of_a_random_miner_and_of_a_fallback_changes_the_key(make_recipe: Any, change: dict[str, int]) -> None:
    def keys(miner: dict[str, Any]) -> list[str]:
        alone = make_recipe({"miners": [miner]})
        last = make_recipe({**MINING, "fallback": miner})
        return [key_of(candidates_fields(alone, DIGEST, [])), key(last), key(make_recipe(MINING))]

    before, after = keys(RANDOM), keys({**RANDOM, **change})

    assert len({*before, *after}) == 5  # what has no fallback keeps its key


def test_a_runs_bytes_change_the_key_and_its_path_does_not(make_recipe: Any) -> None:
    def run_key(miner: dict[str, Any], digest: str) -> str:
        return key_of(candidates_fields(make_recipe({"miners": [miner]}), DIGEST, [{"sha256": digest}]))

    assert run_key(RUN, "abc") == run_key({**RUN, "path": "elsewhere/b.run"}, "abc")
    assert len({run_key(RUN, "abc"), run_key(RUN, "xyz"), run_key({**RUN, "skip": 1}, "abc")}) == 3


def test_another_kind_of_index_changes_the_key_and_flat_is_what_there_always_was(make_recipe: Any) -> None:
    kinds = ["flat", "ivf-flat", "ivf-pq", "hnsw"]

    keys = [key(make_recipe(changed("miners.1.index", kind))) for kind in kinds]

    assert keys[0] == key(make_recipe(MINING))
    assert len({*keys}) == 4


def test_a_sparse_miners_model_changes_the_key(make_recipe: Any) -> None:
    recipe = make_recipe({"miners": [{"kind": "sparse", "quota": 2, "model": "some/student"}]})
    moved = make_recipe({"miners": [{"kind": "sparse", "quota": 2, "model": "/elsewhere"}]})

    assert key(recipe) == key(moved) != key(recipe, encoder={"weights": "xyz"})


def test_near_duplicates_enter_the_key_whoever_scores(make_recipe: Any) -> None:
    by_teacher = {"by": "judge", "absolute_margin": 1.0}
    near = {**by_teacher, "near_duplicate": 0.9}

    assert key(make_recipe(changed("filter", near))) != key(make_recipe(changed("filter", by_teacher)))


def test_an_encoder_without_identity_or_a_file_without_digest_is_refused(make_recipe: Any) -> None:
    with pytest.raises(ValueError, match="0 identities for 1 miners that have one"):
        candidates_fields(make_recipe(MINING), DIGEST, [])
    with pytest.raises(ValueError, match=r"no digest of corpus\.jsonl"):
        candidates_fields(make_recipe(MINING), {}, [ENCODER])


def test_miners_of_one_kind_are_told_apart(make_recipe: Any) -> None:
    miners = [*MINING["miners"], *MINING["miners"]]

    assert miner_names(make_recipe({"miners": miners}).mining.miners) == ["bm25", "dense", "bm25-2", "dense-2"]


@pytest.fixture
def published(tmp_path: Path, make_recipe: Any, collection: Any, word_vectors: Any, fields_of: Any) -> Path:
    recipe = make_recipe({"miners": MINING["miners"]})
    fields = fields_of(recipe, collection)
    candidates = mine_candidates(recipe, collection, cache=tmp_path, fields=fields, source=word_vectors())
    return candidates.artifact.folder


def test_what_was_published_opens(published: Path) -> None:
    candidates = Candidates.open(published)

    assert candidates.key == published.name
    assert [row.query_id for row in candidates] == ["q0", "q1", "q2", "q3"]


def test_every_cut_and_every_flipped_byte_is_refused_by_name(published: Path) -> None:
    shard = next(published.glob("*.arrow"))
    whole = shard.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole), 64)]
    damaged += [whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in range(0, len(whole), 97)]

    for content in damaged:
        shard.write_bytes(content)
        with pytest.raises(IntegrityError, match=r"candidates-00000-of-00001\.arrow"):
            Candidates.open(published)


def test_a_missing_shard_another_kind_and_no_manifest_are_refused(published: Path, tmp_path: Path) -> None:
    shard, manifest = next(published.glob("*.arrow")), published / "manifest.json"
    shard.rename(tmp_path / "away.arrow")
    with pytest.raises(IntegrityError, match=r"candidates-00000-of-00001\.arrow: missing"):
        Candidates.open(published)
    (tmp_path / "away.arrow").rename(shard)

    write_manifest(published, {**read_manifest(published), "kind": "score-table"})
    with pytest.raises(IntegrityError, match="holds 'score-table', expected 'candidates'"):
        Candidates.open(published)

    manifest.unlink()
    with pytest.raises(IntegrityError, match="was never published"):
        Candidates.open(published)


def test_keys_and_policy_import_neither_torch_nor_a_search_library() -> None:
    code = "import sys, sparsekd.mining.candidates, sparsekd.mining.selection; print(*sys.modules)"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert not {"torch", "faiss", "bm25s", "transformers"} & set(loaded)


def test_mining_imports_no_torch() -> None:
    code = "import sys, sparsekd.mining.miners; print(*sys.modules)"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert not {"torch", "transformers", "sentence_transformers"} & set(loaded)
