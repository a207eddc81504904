"""Late interaction against the transformer, projection and MaxSim written out one pair at a time, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.artifact import key_of
from sparsekd.bank.scores import ScoreBank
from sparsekd.recipe import Run, Teacher
from sparsekd.teachers import late_interaction
from sparsekd.teachers.identity import encoder_identity, teacher_identity
from sparsekd.teachers.late_interaction import LateInteractionScorer
from sparsekd.teachers.scoring import PairTexts, bank_scorer

Draw = Callable[..., list[str]]
Save = Callable[..., Path]
QUERY, PASSAGE = "what is the heat", "the heat of a wave, in the river."


def spec(folder: Path, **fields: Any) -> Teacher:
    return Teacher(**{"name": "l", "kind": "late-interaction", "model": str(folder), **fields})


def scorer(folder: Path, run: Run | None = None, **fields: Any) -> LateInteractionScorer:
    return LateInteractionScorer(spec(folder, **fields), run or Run())


@pytest.fixture
def pairs(draw_texts: Draw) -> list[tuple[str, str]]:
    """Pairs of which some passages exceed the tiny model's 128 tokens."""
    return list(zip(draw_texts(20, longest=10), draw_texts(20, longest=120, seed=1), strict=True))


def plain_scores(
    folder: Path,
    pairs: list[tuple[str, str]],
    *,
    skip: str = "",
    passage_tokens: int = 128,
    query_width: int = 0,
    mean: bool = False,
) -> list[float]:
    """Σ over query tokens of the largest dot product of unit vectors: BertModel, one matrix, one pair at a time."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    tokenizer, body = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype="float32").eval()
    projection = load_file(next(folder.glob("*Dense*/model.safetensors")))["linear.weight"]
    skipped = [] if not skip else tokenizer.convert_tokens_to_ids(list(skip))

    def vectors(ids: list[int], attended: list[int]) -> Any:
        with torch.inference_mode():
            states = body(torch.tensor([ids]), attention_mask=torch.tensor([attended])).last_hidden_state[0]
        return torch.nn.functional.normalize(states @ projection.T, dim=-1)

    found = []
    for query, passage in pairs:
        query_ids = tokenizer(query)["input_ids"]
        padded = query_ids + [tokenizer.mask_token_id] * (query_width - len(query_ids))
        left = vectors(padded, [1] * len(query_ids) + [0] * (len(padded) - len(query_ids)))
        passage_ids = tokenizer(passage, truncation=True, max_length=passage_tokens)["input_ids"]
        kept = [place for place, token_id in enumerate(passage_ids) if token_id not in skipped]
        right = vectors(passage_ids, [1] * len(passage_ids))[kept]
        largest = (left @ right.T).max(dim=1).values
        found.append(float(largest.mean() if mean else largest.sum()))
    return found


@pytest.mark.parametrize("batch_tokens", [16, 8192])
@pytest.mark.parametrize("packed", [True, False])
def test_scores_are_maxsim_of_projected_token_states(
    tiny_multi_vector_folder: Path, pairs: list[tuple[str, str]], batch_tokens: int, packed: bool
) -> None:
    teacher = scorer(tiny_multi_vector_folder, Run(batch_tokens=batch_tokens, packed=packed))

    scores = teacher.score(pairs)

    np.testing.assert_allclose(scores, plain_scores(tiny_multi_vector_folder, pairs), atol=1e-4)
    assert scores.dtype == np.float32
    assert 0 < teacher.num_truncated < len(pairs)


def test_scores_equal_the_librarys_own(tiny_multi_vector_folder: Path, pairs: list[tuple[str, str]]) -> None:
    from sentence_transformers import MultiVectorEncoder

    model = MultiVectorEncoder(str(tiny_multi_vector_folder), device="cpu")
    queries, passages = (list(side) for side in zip(*pairs, strict=True))
    expected = model.similarity_pairwise(model.encode_query(queries), model.encode_document(passages))

    np.testing.assert_allclose(scorer(tiny_multi_vector_folder).score(pairs), expected.numpy(), atol=1e-4)


def test_query_expansion_skipped_words_and_own_lengths_are_the_models(
    save_tiny_multi_vector: Save, pairs: list[tuple[str, str]], tmp_path: Path
) -> None:
    expansion = {"strategy": "fixed", "attend": False, "length": 40}
    folder = save_tiny_multi_vector(tmp_path / "colbert", query_expansion=expansion, document_length=30, skip=tuple(".,-"))
    teacher = scorer(folder)

    scores = teacher.score([*pairs, (QUERY, PASSAGE)])

    expected = plain_scores(folder, [*pairs, (QUERY, PASSAGE)], skip=".,-", passage_tokens=30, query_width=40)
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_a_declared_mean_divides_by_the_tokens_of_the_query(save_tiny_multi_vector: Save, tmp_path: Path) -> None:
    folder = save_tiny_multi_vector(tmp_path / "mean", similarity="meanmaxsim")

    scores = scorer(folder).score([(QUERY, PASSAGE)])

    np.testing.assert_allclose(scores, plain_scores(folder, [(QUERY, PASSAGE)], mean=True), atol=1e-5)


def test_max_length_bounds_passages_alone_and_what_is_cut_is_counted(
    tiny_multi_vector_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long_query = "the heat of a wave in the river of the old queen"
    teacher = scorer(tiny_multi_vector_folder, max_length=8)

    scores = teacher.score([(long_query, long_query), (long_query, "the heat of a")])

    expected = plain_scores(tiny_multi_vector_folder, [(long_query, long_query), (long_query, "the heat of a")], passage_tokens=8)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert teacher.num_truncated == 1
    assert "teacher l: passage texts over 8 tokens are cut by the model and counted" in caplog.text


def test_prompts_are_the_recipes_and_never_the_models_own(save_tiny_multi_vector: Save, tmp_path: Path) -> None:
    folder = save_tiny_multi_vector(tmp_path / "prompts", prompts={"query": "who: ", "document": "text: "})

    bare, prompted = (
        scorer(folder, query_prompt=query, passage_prompt=passage).score([(QUERY, PASSAGE)])
        for query, passage in (("", ""), ("who: ", "text: "))
    )

    np.testing.assert_allclose(bare, plain_scores(folder, [(QUERY, PASSAGE)]), atol=1e-4)
    np.testing.assert_allclose(prompted, plain_scores(folder, [("who: " + QUERY, "text: " + PASSAGE)]), atol=1e-4)


# Through the bank


def all_pairs(queries: list[str], passages: list[str]) -> PairTexts:
    places = np.indices((len(queries), len(passages))).reshape(2, -1).astype(np.int32)
    return PairTexts(queries, passages, places[0], places[1])


def test_each_text_is_encoded_once_for_all_its_pairs(
    tiny_multi_vector_folder: Path, draw_texts: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsekd.teachers.scoring.BLOCK", 4)
    texts = all_pairs(draw_texts(6, longest=8), draw_texts(9, longest=30, seed=1))
    teacher = scorer(tiny_multi_vector_folder)
    encoded: list[str] = []
    encode = teacher._encode
    monkeypatch.setattr(teacher, "_encode", lambda new, role: encoded.extend(new) or encode(new, role))
    scores = ScoreBank(tmp_path).open(teacher.identity, reference="l")

    counts = bank_scorer(teacher, "l", Run(shard_pairs=10), scores, texts, by_passage=True)

    assert (counts.pairs_scored, counts.pairs_reused) == (54, 0)
    assert sorted(encoded) == sorted([*texts.queries, *texts.passages])
    again = bank_scorer(scorer(tiny_multi_vector_folder, Run(device="cuda:99")), "l", Run(), scores, texts, by_passage=True)
    assert (again.pairs_scored, again.pairs_reused) == (0, 54)


def test_what_is_kept_stays_within_its_budget_and_scores_stay(
    tiny_multi_vector_folder: Path, draw_texts: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [(query, passage) for passage in draw_texts(6, seed=1) for query in draw_texts(4, longest=6)]
    whole = scorer(tiny_multi_vector_folder).score(pairs)
    monkeypatch.setattr(late_interaction, "_KEPT_BYTES", 2000)
    teacher = scorer(tiny_multi_vector_folder)

    scores = np.concatenate([teacher.score(pairs[start : start + 5]) for start in range(0, len(pairs), 5)])

    np.testing.assert_allclose(scores, whole, atol=1e-5)
    for kept in teacher._kept.values():
        assert sum(vectors.nbytes for vectors in kept.values()) <= 2000


# What is refused


def test_no_pairs_load_no_model(tiny_multi_vector_folder: Path) -> None:
    assert scorer(tiny_multi_vector_folder, Run(device="cuda:99")).score([]).shape == (0,)


def test_a_model_with_prompts_that_the_recipe_does_not_mention_is_refused(save_tiny_multi_vector: Save, tmp_path: Path) -> None:
    folder = save_tiny_multi_vector(tmp_path / "prompts", prompts={"query": "[Q] ", "document": "[D] "})

    with pytest.raises(ValueError, match=r"has the query prompt '\[Q\] ', .* of query_prompt; set query_prompt = \"\[Q\] \""):
        teacher_identity(spec(folder))
    with pytest.raises(ValueError, match="nothing of passage_prompt"):
        teacher_identity(spec(folder, query_prompt="[Q] "))
    assert teacher_identity(spec(folder, query_prompt="[Q] ", passage_prompt=""))["passage_prompt"] == ""


def test_another_kind_of_model_is_refused_and_so_is_late_interaction_called_dense(
    tiny_encoder_folder: Path, tiny_headless_folder: Path, tiny_multi_vector_folder: Path
) -> None:
    with pytest.raises(ValueError, match="holds SentenceTransformer; expected a saved MultiVectorEncoder"):
        teacher_identity(spec(tiny_encoder_folder))
    with pytest.raises(ValueError, match=r"holds no model_type in config_sentence_transformers.json; expected a saved Multi"):
        teacher_identity(spec(tiny_headless_folder))
    with pytest.raises(ValueError, match=r'holds a MultiVectorEncoder; .* for a MultiVectorEncoder kind = "late-interaction"'):
        encoder_identity(Teacher(name="d", kind="dense", model=str(tiny_multi_vector_folder)))


@pytest.fixture
def folder(tiny_multi_vector_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_multi_vector_folder, tmp_path / "copy"))


def edit_weights(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_transformer_without_some_weights_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("encoder.layer.1.output.dense.weight"))

    message = r"lacks 1 weights \(encoder.layer.1.output.dense.weight\), which would be drawn at random"
    with pytest.raises(ValueError, match=message):
        scorer(folder).score([(QUERY, PASSAGE)])


@pytest.mark.parametrize("place", ["", "1_Dense"])
def test_pickled_weights_of_any_module_are_refused(folder: Path, place: str) -> None:
    (folder / place / "model.safetensors").rename(folder / place / "pytorch_model.bin")

    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle"):
        teacher_identity(spec(folder))


def test_scores_that_are_not_finite_are_refused(folder: Path) -> None:
    def spoil(weights: dict[str, Any]) -> None:
        weights["embeddings.word_embeddings.weight"][5] = np.nan  # row 5: the first word of the vocabulary, "a"

    edit_weights(folder, spoil)

    with pytest.raises(ValueError, match=r"1 of 2 scores are not finite \(first: pair 1, 'what is the heat' with 'a wave', nan"):
        scorer(folder).score([(QUERY, "the wave"), (QUERY, "a wave")])


def test_a_passage_of_skipped_words_alone_is_refused(save_tiny_multi_vector: Save, tmp_path: Path) -> None:
    folder = save_tiny_multi_vector(tmp_path / "skipping", skip=("[CLS]", "[SEP]", "."))

    with pytest.raises(ValueError, match=r"passage '\.\.\.' has no token that the model compares .* undefined; take the text"):
        scorer(folder).score([(QUERY, PASSAGE), (QUERY, "...")])


def test_more_tokens_than_positions_are_refused(tiny_multi_vector_folder: Path) -> None:
    with pytest.raises(ValueError, match="max_length = 256, but it has only 128 positions"):
        scorer(tiny_multi_vector_folder, max_length=256).score([(QUERY, PASSAGE)])


# Key


@pytest.mark.parametrize(
    "fields", [{"max_length": 64}, {"query_prompt": "q"}, {"passage_prompt": "p"}, {"dtype": "bfloat16"}], ids=str
)
def test_whatever_changes_a_score_changes_the_key(tiny_multi_vector_folder: Path, fields: dict[str, Any]) -> None:
    key, changed = (key_of(teacher_identity(spec(tiny_multi_vector_folder, **each))) for each in ({}, fields))

    assert key != changed


@pytest.mark.parametrize("name", ["1_Dense/config.json", "2_MultiVectorMask/config.json", "config_sentence_transformers.json"])
def test_changing_a_modules_settings_changes_the_key(folder: Path, name: str) -> None:
    before = key_of(teacher_identity(spec(folder)))

    content = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps({**content, "note": 1}), encoding="utf-8")

    assert key_of(teacher_identity(spec(folder))) != before
