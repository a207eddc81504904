"""Scoring through the banks: only what is unknown, once, in an order that a restart reproduces."""

from __future__ import annotations

import itertools
import logging
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.artifact import key_of
from sparsekd.bank.embeddings import EmbeddingBank
from sparsekd.bank.scores import ScoreBank, TeacherScores
from sparsekd.bank.text_key import text_keys
from sparsekd.recipe import Run, Teacher
from sparsekd.teachers import progress
from sparsekd.teachers.batching import TokenBudget, forward_batches
from sparsekd.teachers.embedding import banked_vectors
from sparsekd.teachers.identity import teacher_identity
from sparsekd.teachers.scoring import PairTexts, ScoringCounts, bank_scorer, bank_scores, bank_similarities

Draw = Callable[..., list[str]]


class WordOverlap:
    """A Scorer: words in common; remembers what it was asked, and may break at the n-th call."""

    def __init__(self, *, breaks_at: int | None = None, nan_for: str | None = None) -> None:
        self.identity: dict[str, Any] = {"kind": "word overlap"}
        self.num_truncated = 0
        self.reference = "a fake"
        self.asked: list[list[tuple[str, str]]] = []
        self._breaks_at, self._nan_for = breaks_at, nan_for

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        if len(self.asked) == self._breaks_at:
            raise KeyboardInterrupt
        self.asked.append(list(pairs))
        scores = [
            np.nan if passage == self._nan_for else len({*query.split()} & {*passage.split()}) for query, passage in pairs
        ]
        return np.array(scores, dtype=np.float32)


class CountedMemory:
    """A BatchedScorer: words in common, by batches that raise a real error of some allocator where they exceed its memory."""

    def __init__(self, allocate: Callable[[], object], *, tokens: int, capacity: int) -> None:
        self.identity: dict[str, Any] = {"kind": "word overlap"}
        self.num_truncated = 0
        self.budget = TokenBudget(tokens)
        self.failures = 0
        self.shards: list[tuple[str, int]] = []
        self._allocate, self._capacity = allocate, capacity

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        return self.score_tokens(self.tokenize(pairs), lambda _: None)

    def tokenize(self, pairs: Sequence[tuple[str, str]]) -> list[list[set[str]]]:
        self.shards.append((threading.current_thread().name, len(pairs)))
        return [[{*query.split()}, {*passage.split()}] for query, passage in pairs]

    def score_tokens(self, tokens: list[list[set[str]]], done: Callable[[int], object]) -> np.ndarray:
        lengths = np.array([len(query) + len(passage) for query, passage in tokens])

        def forward(batch: np.ndarray) -> Callable[[], np.ndarray]:
            if len(batch) * lengths[batch].max() > self._capacity:
                self.failures += 1
                self._allocate()
            return lambda: np.array([len(tokens[place][0] & tokens[place][1]) for place in batch], dtype=np.float32)

        return forward_batches(forward, lengths, self.budget, done)


class LetterCounts:
    """An Encoder: how often each letter occurs; remembers what it encoded."""

    def __init__(self, query_prompt: str = "", passage_prompt: str = "") -> None:
        self.identity = {"kind": "letters", "query_prompt": query_prompt, "passage_prompt": passage_prompt}
        self.similarity = "dot"
        self.dimension = 26
        self.num_truncated = 0
        self.reference = "a fake"
        self.encoded: list[str] = []

    def encode(self, texts: Sequence[str], *, role: str) -> np.ndarray:
        prompted = [self.identity[f"{role}_prompt"] + text for text in texts]
        self.encoded += prompted
        return np.array([[text.count(chr(97 + letter)) for letter in range(26)] for text in prompted], dtype=np.float32)

    def score_vectors(self, query_vectors: np.ndarray, passage_vectors: np.ndarray) -> np.ndarray:
        return np.asarray((query_vectors * passage_vectors).sum(axis=1), dtype=np.float32)


def all_pairs(queries: list[str], passages: list[str]) -> PairTexts:
    query_index, passage_index = np.divmod(np.arange(len(queries) * len(passages), dtype=np.int32), len(passages))
    return PairTexts(queries, passages, query_index, passage_index)


def known(scores: TeacherScores, texts: PairTexts) -> np.ndarray:
    return scores.lookup(text_keys(texts.queries)[texts.query_index], text_keys(texts.passages)[texts.passage_index])


@pytest.fixture
def texts(draw_texts: Draw) -> PairTexts:
    return all_pairs(draw_texts(7, longest=8), draw_texts(30, seed=1))


@pytest.fixture
def scores(tmp_path: Path) -> TeacherScores:
    return ScoreBank(tmp_path / "bank").open({"kind": "word overlap"})


def test_every_pair_is_banked_with_the_teachers_score(scores: TeacherScores, texts: PairTexts) -> None:
    counts = bank_scorer(WordOverlap(), "overlap", Run(), scores, texts)

    pairs = [(texts.queries[q], texts.passages[p]) for q, p in zip(texts.query_index, texts.passage_index, strict=True)]
    assert known(scores, texts).tolist() == WordOverlap().score(pairs).tolist()
    assert counts == ScoringCounts(pairs=210, pairs_scored=210, pairs_reused=0, num_truncated=0)


def test_only_unknown_pairs_reach_the_teacher(scores: TeacherScores, texts: PairTexts, draw_texts: Draw) -> None:
    bank_scorer(WordOverlap(), "overlap", Run(), scores, texts)
    new = draw_texts(2, seed=9)
    teacher = WordOverlap()

    counts = bank_scorer(teacher, "overlap", Run(), scores, all_pairs([*texts.queries], [*texts.passages, *new]))

    assert {pair for call in teacher.asked for pair in call} == {(query, passage) for query in texts.queries for passage in new}
    assert (counts.pairs, counts.pairs_scored, counts.pairs_reused) == (224, 14, 210)


def test_nothing_unknown_asks_the_teacher_nothing(scores: TeacherScores, texts: PairTexts) -> None:
    bank_scorer(WordOverlap(), "overlap", Run(), scores, texts)
    teacher = WordOverlap()

    counts = bank_scorer(teacher, "overlap", Run(), scores, texts)

    assert (teacher.asked, counts.pairs_reused) == ([], 210)


def test_a_pair_asked_twice_under_two_rows_is_scored_once(scores: TeacherScores) -> None:
    teacher = WordOverlap()

    counts = bank_scorer(teacher, "overlap", Run(), scores, all_pairs(["a b", "a b"], ["b c", "c d", "b c"]))

    assert sorted(teacher.asked[0]) == [("a b", "b c"), ("a b", "c d")]
    assert counts.pairs == 2


def test_no_pairs_are_no_work(scores: TeacherScores) -> None:
    assert bank_scorer(WordOverlap(), "overlap", Run(), scores, all_pairs([], [])) == ScoringCounts(0, 0, 0, 0)


def test_pairs_reach_the_teacher_longest_first_whatever_their_order(tmp_path: Path, texts: PairTexts) -> None:
    backwards = PairTexts(texts.queries, texts.passages, texts.query_index[::-1], texts.passage_index[::-1])
    asked = []
    for number, order in enumerate((texts, backwards)):
        teacher = WordOverlap()
        bank_scorer(teacher, "overlap", Run(), ScoreBank(tmp_path / str(number)).open(teacher.identity), order)
        asked.append(teacher.asked)

    lengths = [len(query) + len(passage) for query, passage in asked[0][0]]
    assert asked[0] == asked[1]
    assert lengths == sorted(lengths, reverse=True)


def test_pairs_of_one_query_come_together_where_that_is_asked_for(scores: TeacherScores, texts: PairTexts) -> None:
    teacher = WordOverlap()

    bank_scorer(teacher, "overlap", Run(shard_pairs=100), scores, texts, by_query=True)

    queries = [query for call in teacher.asked for query, _ in call]
    assert len(queries) == 210
    assert sum(left != right for left, right in itertools.pairwise(queries)) == len(set(queries)) - 1


@pytest.mark.parametrize("breaks_at", [0, 1, 5])
def test_a_killed_run_resumes_with_the_same_batches(tmp_path: Path, texts: PairTexts, breaks_at: int) -> None:
    run = Run(shard_pairs=32)
    whole, killed, resumed = WordOverlap(), WordOverlap(breaks_at=breaks_at), WordOverlap()
    bank_scorer(whole, "overlap", run, ScoreBank(tmp_path / "whole").open(whole.identity), texts)

    with pytest.raises(KeyboardInterrupt):
        bank_scorer(killed, "overlap", run, ScoreBank(tmp_path / "killed").open(killed.identity), texts)
    bank_scorer(resumed, "overlap", run, ScoreBank(tmp_path / "killed").open(resumed.identity), texts)

    assert killed.asked + resumed.asked == whole.asked
    assert [len(call) for call in whole.asked] == [32] * 6 + [18]


@pytest.mark.parametrize("kind", ["cross-encoder", "dense"])
def test_a_killed_run_of_a_real_teacher_resumes_to_equal_bytes(
    kind: str,
    tmp_path: Path,
    texts: PairTexts,
    tiny_encoder_folder: Path,
    tiny_cross_encoder_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tiny_encoder_folder if kind == "dense" else tiny_cross_encoder_folder
    teacher = Teacher(name="t", kind=kind, model=str(folder))
    run = Run(shard_pairs=16, batch_tokens=256)
    whole = open_banks(tmp_path / "whole", teacher)
    bank_scores(teacher, run, *whole, texts)

    append, appended = TeacherScores.append, []

    def append_thrice(self: TeacherScores, *arguments: Any, **keywords: Any) -> None:
        if len(appended) == 3:
            raise KeyboardInterrupt
        appended.append(True)
        append(self, *arguments, **keywords)

    monkeypatch.setattr(TeacherScores, "append", append_thrice)
    with pytest.raises(KeyboardInterrupt):
        bank_scores(teacher, run, *open_banks(tmp_path / "killed", teacher), texts)
    monkeypatch.undo()
    resumed = open_banks(tmp_path / "killed", teacher)
    counts = bank_scores(teacher, run, *resumed, texts)

    assert (counts.pairs_reused, counts.pairs_scored) == (48, 162)
    assert known(resumed[0], texts).tobytes() == known(whole[0], texts).tobytes()


def open_banks(root: Path, teacher: Teacher) -> tuple[TeacherScores, EmbeddingBank]:
    return ScoreBank(root).open(teacher_identity(teacher)), EmbeddingBank(root)


def test_a_teacher_that_gives_nan_is_refused_and_its_shard_not_banked(scores: TeacherScores, texts: PairTexts) -> None:
    teacher = WordOverlap(nan_for=texts.passages[3])

    with pytest.raises(ValueError, match=r"7 of 210 scores are NaN .* nothing was stored \(first: query '.*', passage '"):
        bank_scorer(teacher, "overlap", Run(), scores, texts)

    assert scores.num_pairs == 0


def torch_allocation() -> object:
    import torch

    return torch.empty(1 << 50)


ALLOCATIONS: dict[str, Callable[[], object]] = {
    "Python": lambda: bytearray(1 << 60),
    "NumPy": lambda: np.ones(1 << 60, dtype=np.uint8),
    "torch": torch_allocation,
}


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_out_of_memory_halves_the_batch_and_scoring_goes_on(
    scores: TeacherScores, texts: PairTexts, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = CountedMemory(ALLOCATIONS[name], tokens=4096, capacity=300)

    counts = bank_scorer(teacher, "overlap", Run(shard_pairs=70), scores, texts)

    expected = WordOverlap().score([(query, passage) for query in texts.queries for passage in texts.passages])
    assert known(scores, texts).tolist() == expected.tolist()
    assert counts.pairs_scored == 210
    assert 1 <= teacher.failures <= 4  # once per halving, not once per batch or shard
    assert teacher.budget.tokens <= 300
    said = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert len(said) == teacher.failures
    assert said[0].startswith("out of memory at 4096 tokens per forward pass; going on with ")


def test_a_pair_that_alone_exceeds_memory_is_an_error_that_says_what_to_do(scores: TeacherScores, texts: PairTexts) -> None:
    teacher = CountedMemory(ALLOCATIONS["torch"], tokens=4096, capacity=10)

    with pytest.raises(MemoryError, match=r"out of memory on one text of \d+ tokens alone \(.*allocate.*\); lower max_length, or"):
        bank_scorer(teacher, "overlap", Run(), scores, texts)

    assert scores.num_pairs == 0


def test_another_runtime_error_is_not_taken_for_lack_of_memory(scores: TeacherScores, texts: PairTexts) -> None:
    import torch

    teacher = CountedMemory(lambda: torch.ones(2) @ torch.ones(3), tokens=4096, capacity=10)

    with pytest.raises(RuntimeError, match="size"):
        bank_scorer(teacher, "overlap", Run(), scores, texts)

    assert teacher.failures == 1


def test_shards_after_the_first_are_tokenized_off_the_main_thread(scores: TeacherScores, texts: PairTexts) -> None:
    teacher = CountedMemory(ALLOCATIONS["torch"], tokens=64, capacity=4096)

    bank_scorer(teacher, "overlap", Run(shard_pairs=60), scores, texts)

    threads, sizes = zip(*teacher.shards, strict=True)
    assert sizes == (60, 60, 60, 30)
    assert threads[0] == threading.current_thread().name
    assert threading.current_thread().name not in threads[1:]


def test_a_cross_encoders_shards_hold_its_scores_of_each_pair(
    tmp_path: Path, texts: PairTexts, tiny_cross_encoder_folder: Path
) -> None:
    from sparsekd.teachers.cross_encoder import CrossEncoderScorer

    teacher = Teacher(name="t", kind="cross-encoder", model=str(tiny_cross_encoder_folder), max_length=64)
    banks = open_banks(tmp_path, teacher)

    counts = bank_scores(teacher, Run(shard_pairs=64, batch_tokens=200), *banks, texts)

    scorer = CrossEncoderScorer(teacher, Run())
    expected = scorer.score([(query, passage) for query in texts.queries for passage in texts.passages])
    np.testing.assert_allclose(known(banks[0], texts), expected, atol=1e-5)
    assert counts.num_truncated == scorer.num_truncated


def test_a_fully_banked_teacher_is_not_loaded(tmp_path: Path, texts: PairTexts, tiny_cross_encoder_folder: Path) -> None:
    teacher = Teacher(name="t", kind="cross-encoder", model=str(tiny_cross_encoder_folder))
    banks = open_banks(tmp_path, teacher)
    bank_scores(teacher, Run(), *banks, texts)

    counts = bank_scores(teacher, Run(device="cuda:99"), *banks, texts)

    assert counts.pairs_scored == 0


def test_a_dense_teachers_scores_are_its_own_similarity(tmp_path: Path, texts: PairTexts, tiny_encoder_folder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    teacher = Teacher(name="t", kind="dense", model=str(tiny_encoder_folder))
    scores, embeddings = open_banks(tmp_path, teacher)

    bank_scores(teacher, Run(shard_pairs=50), scores, embeddings, texts)

    model = SentenceTransformer(str(tiny_encoder_folder), device="cpu")
    queries, passages = (model.encode(list(side), show_progress_bar=False) for side in (texts.queries, texts.passages))
    expected = model.similarity(queries, passages).numpy().ravel()
    np.testing.assert_allclose(known(scores, texts), expected, rtol=1e-4)


def test_a_dense_teacher_encodes_each_text_once(tmp_path: Path) -> None:
    encoder = LetterCounts()
    scores, embeddings = ScoreBank(tmp_path).open(encoder.identity), EmbeddingBank(tmp_path)

    bank_similarities(encoder, "letters", Run(), scores, embeddings, all_pairs(["ab", "b", "ab"], ["abc", "b"]))
    bank_similarities(encoder, "letters", Run(), scores, embeddings, all_pairs(["ab", "b"], ["abc", "new"]))

    assert sorted(encoder.encoded) == ["ab", "abc", "b", "new"]
    assert known(scores, all_pairs(["ab", "b"], ["abc", "new"])).tolist() == [2, 0, 1, 0]


def test_banked_vectors_come_in_input_order(tmp_path: Path) -> None:
    encoder, bank = LetterCounts(), EmbeddingBank(tmp_path)
    banked_vectors(encoder, bank, ["a", "bb"], "passage", Run(shard_pairs=1))
    texts = ["ccc", "bb", "ccc", "a"]

    vectors = banked_vectors(encoder, bank, texts, "passage", Run(shard_pairs=1))

    assert (vectors == LetterCounts().encode(texts, role="passage")).all()
    assert encoder.encoded == ["bb", "a", "ccc"]


def test_equal_text_under_equal_prompts_is_shared_between_roles(tmp_path: Path) -> None:
    encoder, bank = LetterCounts(), EmbeddingBank(tmp_path)
    banked_vectors(encoder, bank, ["ab"], "query", Run(shard_pairs=10))

    banked_vectors(encoder, bank, ["ab"], "passage", Run(shard_pairs=10))

    assert encoder.encoded == ["ab"]


def test_equal_text_under_unequal_prompts_is_not_shared(tmp_path: Path) -> None:
    encoder, bank = LetterCounts(query_prompt="q "), EmbeddingBank(tmp_path)

    query, passage = (banked_vectors(encoder, bank, ["ab"], role, Run(shard_pairs=10)) for role in ("query", "passage"))

    assert encoder.encoded == ["q ab", "ab"]
    assert (query != passage).any()


def test_a_miner_and_a_teacher_of_one_model_share_vectors(tmp_path: Path, texts: PairTexts, tiny_encoder_folder: Path) -> None:
    from sparsekd.recipe import DenseMiner
    from sparsekd.teachers.dense import DenseEncoder

    miner = DenseEncoder(DenseMiner(kind="dense", quota=1, model=str(tiny_encoder_folder)), Run())
    teacher = Teacher(name="t", kind="dense", model=str(tiny_encoder_folder))
    scores, embeddings = open_banks(tmp_path, teacher)
    banked_vectors(miner, embeddings, texts.queries, "query", Run(shard_pairs=100))
    banked_vectors(miner, embeddings, texts.passages, "passage", Run(shard_pairs=100))

    # The device does not exist, so encoding anything would be refused.
    counts = bank_scores(teacher, Run(device="cuda:99"), scores, embeddings, texts)

    assert counts.pairs_scored == 210
    assert key_of(miner.identity) == key_of(teacher_identity(teacher))


def test_a_progress_line_in_a_log_says_reuse_rate_and_time_left(
    scores: TeacherScores, texts: PairTexts, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank_scorer(WordOverlap(), "overlap", Run(), scores, all_pairs(texts.queries[:1], texts.passages))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)

    bank_scorer(WordOverlap(), "overlap", Run(shard_pairs=90), scores, texts)

    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"[\d.]+ pairs/s", "R pairs/s", line) for line in lines] == [
        "overlap, 14% of 210 reused: 76/180 pairs, R pairs/s, 00:00 left",  # a shard holds 90 of all pairs, known ones too
        "overlap, 14% of 210 reused: 152/180 pairs, R pairs/s, 00:00 left",
        "overlap, 14% of 210 reused: 180/180 pairs, R pairs/s, 00:00 left",
    ]


def test_a_run_says_its_counts_and_the_range_of_scores(
    scores: TeacherScores, texts: PairTexts, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="sparsekd")

    bank_scorer(WordOverlap(), "overlap", Run(), scores, texts)

    banked = known(scores, texts)
    counted, ranged = (record.getMessage() for record in caplog.records)
    assert counted.startswith("teacher overlap: 210 pairs, scored 210, reused 0, ")
    assert ranged == f"teacher overlap: gold_sim min {banked.min():.4f}, mean {banked.mean():.4f}, max {banked.max():.4f}"
