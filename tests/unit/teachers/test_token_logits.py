"""Language models as teachers against plain transformers, one pair at a time, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsekd.artifact import key_of
from sparsekd.recipe import CausalLMTeacher, Run, Seq2SeqLMTeacher
from sparsekd.teachers.identity import teacher_identity
from sparsekd.teachers.token_logits import TokenLogitScorer

Draw = Callable[..., list[str]]
QUERY, PASSAGE = "what is the heat", "the heat of a wave in the river of the old queen"
# Written out once more from Qwen3-Reranker's model card, in the pieces it is tokenised in.
PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. Note that "
    'the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
TASK = "Given a web search query, retrieve relevant passages that answer the query"
SHORT = "Q: {query} D: {passage} <|im_end|>"


def decoder(folder: Path, **fields: Any) -> CausalLMTeacher:
    return CausalLMTeacher(**{"name": "c", "kind": "causal-lm", "model": str(folder), "max_length": 1024, **fields})


def t5(folder: Path, **fields: Any) -> Seq2SeqLMTeacher:
    return Seq2SeqLMTeacher(**{"name": "t", "kind": "seq2seq-lm", "model": str(folder), **fields})


def scorer(teacher: Any, run: Run | None = None) -> TokenLogitScorer:
    return TokenLogitScorer(teacher, run or Run())


@pytest.fixture
def pairs(draw_texts: Draw) -> list[tuple[str, str]]:
    """Pairs of many lengths."""
    return list(zip(draw_texts(12, longest=10), draw_texts(12, longest=60, seed=1), strict=True))


def card_logits(folder: Path, pairs: list[tuple[str, str]], max_length: int = 8192) -> list[float]:
    """Logit of yes less logit of no, as the model card computes them, one pair at a time and only the passage cut."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    prefix, suffix = (tokenizer.encode(part, add_special_tokens=False) for part in (PREFIX, SUFFIX))
    found = []
    for query, passage in pairs:
        middle = tokenizer.encode(f"<Instruct>: {TASK}\n<Query>: {query}\n<Document>: {passage}", add_special_tokens=False)
        ids = prefix + middle[: max_length - len(prefix) - len(suffix)] + suffix
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        found.append(float(logits[yes] - logits[no]))
    return found


@pytest.mark.parametrize("batch_tokens", [16, 4096])
def test_a_decoder_scores_as_its_model_card_does(
    tiny_decoder_folder: Path, pairs: list[tuple[str, str]], batch_tokens: int
) -> None:
    scores = scorer(decoder(tiny_decoder_folder), Run(batch_tokens=batch_tokens)).score(pairs)

    expected = card_logits(tiny_decoder_folder, pairs)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert scores.dtype == np.float32
    assert np.std(expected) > 0.01


def test_a_decoder_with_an_output_layer_of_its_own_scores_by_it(
    save_tiny_decoder: Callable[..., Path], pairs: list[tuple[str, str]], tmp_path: Path
) -> None:
    folder = save_tiny_decoder(tmp_path, tie_word_embeddings=False)

    np.testing.assert_allclose(scorer(decoder(folder)).score(pairs), card_logits(folder, pairs), atol=1e-4)


def test_the_librarys_logit_score_gives_the_same(tiny_decoder_folder: Path, pairs: list[tuple[str, str]]) -> None:
    """sentence-transformers' Transformer and LogitScore over the same prompt."""
    import torch
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(tiny_decoder_folder), device="cpu", model_kwargs={"dtype": "float32"})
    texts = [f"{PREFIX}<Instruct>: {TASK}\n<Query>: {query}\n<Document>: {passage}{SUFFIX}" for query, passage in pairs]
    expected = []
    for text in texts:
        features = model.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            expected.append(float(model({"input_ids": features["input_ids"], "logits_to_keep": 1})["scores"]))

    np.testing.assert_allclose(scorer(decoder(tiny_decoder_folder)).score(pairs), expected, atol=1e-4)


def test_only_the_passage_is_cut_and_the_pair_counted(
    tiny_decoder_folder: Path, caplog: pytest.LogCaptureFixture, draw_texts: Draw
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder_folder)
    whole = f"{PREFIX}<Instruct>: {TASK}\n<Query>: {QUERY}\n<Document>: {PASSAGE}{SUFFIX}"
    limit = len(tokenizer.encode(whole, add_special_tokens=False)) - 3
    pairs = [(QUERY, PASSAGE), (QUERY, "the heat"), (QUERY, draw_texts(1, longest=200, seed=3)[0] + " " + PASSAGE * 9)]
    teacher = scorer(decoder(tiny_decoder_folder, max_length=limit))

    scores = teacher.score(pairs)

    np.testing.assert_allclose(scores, card_logits(tiny_decoder_folder, pairs, limit), atol=1e-4)
    assert teacher.num_truncated == 2
    said = [record.getMessage() for record in caplog.records if record.name.startswith("sparsekd")]
    assert said == [f"teacher c: prompts over {limit} tokens lose the end of their passage"]


def test_a_template_with_the_passage_first_is_cut_inside_the_passage(tiny_decoder_folder: Path) -> None:
    from transformers import AutoTokenizer

    template = "D: {passage} <|im_end|>Q: {query} <|im_start|>"
    whole = AutoTokenizer.from_pretrained(tiny_decoder_folder).encode(template.format(passage=PASSAGE, query=QUERY))
    teacher = scorer(decoder(tiny_decoder_folder, template=template, max_length=len(whole) - 4))

    scores = teacher.score([(QUERY, PASSAGE), (QUERY + " queen", PASSAGE), (QUERY, "xylem " + PASSAGE)])

    assert teacher.num_truncated == 3
    assert abs(scores[0] - scores[1]) > 1e-4  # the query's end is read
    assert abs(scores[0] - scores[2]) > 1e-4  # and the passage's start


def test_texts_that_look_like_places_stay_texts(tiny_decoder_folder: Path) -> None:
    scores = scorer(decoder(tiny_decoder_folder, template=SHORT)).score([("{passage}", "{query}"), ("{query}", "{passage}")])

    plain = decoder(tiny_decoder_folder, template="Q: {query}{passage}")
    joined = scorer(plain).score([("{passage} D: {query} <|im_end|>", ""), ("{query} D: {passage} <|im_end|>", "")])
    np.testing.assert_allclose(scores, joined, atol=1e-4)


def test_without_a_false_token_the_score_is_the_true_ones_logit(tiny_decoder_folder: Path, pairs: list[tuple[str, str]]) -> None:
    yes, no, both = (
        scorer(decoder(tiny_decoder_folder, **tokens)).score(pairs)
        for tokens in ({"false_token": ""}, {"true_token": "no", "false_token": ""}, {})
    )

    np.testing.assert_allclose(yes - no, both, atol=1e-4)


def test_half_precision_weights_give_scores_between_its_own_steps(tiny_decoder_folder: Path, pairs: list[tuple[str, str]]) -> None:
    scores = scorer(decoder(tiny_decoder_folder, dtype="bfloat16")).score(pairs)

    import torch

    assert not np.array_equal(torch.tensor(scores).bfloat16().float().numpy(), scores)
    np.testing.assert_allclose(scores, card_logits(tiny_decoder_folder, pairs), atol=0.3)


# Encoder-decoders


@pytest.mark.parametrize("batch_tokens", [16, 4096])
def test_monot5_scores_by_the_first_decoded_token(tiny_t5_folder: Path, pairs: list[tuple[str, str]], batch_tokens: int) -> None:
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_t5_folder), AutoModelForSeq2SeqLM.from_pretrained(tiny_t5_folder).eval()
    true, false = tokenizer.convert_tokens_to_ids(["▁true", "▁false"])
    expected = []
    for query, passage in pairs:
        features = tokenizer(f"Query: {query} Document: {passage} Relevant:", return_tensors="pt")  # it adds </s> itself
        features.pop("token_type_ids", None)
        with torch.inference_mode():
            logits = model(**features, decoder_input_ids=torch.tensor([[0]])).logits[0, 0]
        # Nogueira et al. 2020: log of the softmax over the two; here its log-odds
        log_probabilities = torch.log_softmax(logits[[false, true]], dim=0)
        expected.append(float(log_probabilities[1] - log_probabilities[0]))

    scores = scorer(t5(tiny_t5_folder), Run(batch_tokens=batch_tokens)).score(pairs)

    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert np.std(expected) > 0.01


def test_monot5_keeps_the_end_of_its_template_when_a_passage_is_cut(tiny_t5_folder: Path) -> None:
    from transformers import AutoTokenizer

    cut = AutoTokenizer.from_pretrained(tiny_t5_folder)(f"Query: {QUERY} Document: the heat of a wave Relevant:")["input_ids"]
    teacher = scorer(t5(tiny_t5_folder, max_length=len(cut)))

    scores = teacher.score([(QUERY, PASSAGE), (QUERY, "the heat of a wave")])

    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert teacher.num_truncated == 1


def test_a_template_without_the_tokenizers_own_special_tokens_is_said(
    tiny_t5_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scorer(t5(tiny_t5_folder)).score([(QUERY, PASSAGE)])
    assert caplog.records == []

    scorer(t5(tiny_t5_folder, template="{query} {passage}")).score([(QUERY, PASSAGE)])

    assert "would add ['</s>'] to a text, the template has none of them" in caplog.text


# What is refused


def test_a_query_that_leaves_no_room_for_a_passage_is_refused(tiny_decoder_folder: Path) -> None:
    teacher = decoder(tiny_decoder_folder, template=SHORT, max_length=7)

    with pytest.raises(ValueError, match=r"template and query take \d+ tokens and leave no room for a passage \(query "):
        scorer(teacher).score([(QUERY, PASSAGE)])


def test_more_tokens_than_the_model_has_positions_are_refused(tiny_decoder_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"max_length = 8192, but it has only 1024 positions; expected at most 1024$"):
        scorer(decoder(tiny_decoder_folder, max_length=8192)).score([(QUERY, PASSAGE)])


def test_a_checkpoint_without_its_output_layer_is_refused(save_tiny_decoder: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = save_tiny_decoder(tmp_path, tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ValueError, match=r"lacks 1 weights \(lm_head.weight\), which would be drawn at random; expected a whole"):
        scorer(decoder(folder)).score([(QUERY, PASSAGE)])


@pytest.mark.parametrize("class_name", ["Qwen3ForSequenceClassification", "Qwen3Model"])
def test_a_decoder_with_another_head_or_none_is_refused(
    save_tiny_decoder: Callable[..., Path], tmp_path: Path, class_name: str
) -> None:
    folder = save_tiny_decoder(tmp_path, class_name, pad_token_id=0)

    with pytest.raises(ValueError, match=rf'names {class_name}; expected a model ...ForCausalLM, .* head kind = "cross'):
        scorer(decoder(folder))


def test_a_decoder_called_cross_encoder_is_refused(tiny_decoder_folder: Path) -> None:
    from sparsekd.recipe import Teacher
    from sparsekd.teachers.cross_encoder import CrossEncoderScorer

    teacher = Teacher(name="c", kind="cross-encoder", model=str(tiny_decoder_folder))

    with pytest.raises(ValueError, match=r'is a text-generation model; .* kind = "causal-lm"'):
        CrossEncoderScorer(teacher, Run()).score([(QUERY, PASSAGE)])


def test_an_encoder_decoder_called_causal_and_the_other_way_round_are_refused(
    tiny_decoder_folder: Path, tiny_t5_folder: Path
) -> None:
    with pytest.raises(ValueError, match='for an encoder-decoder say kind = "seq2seq-lm"'):
        scorer(decoder(tiny_t5_folder))
    with pytest.raises(ValueError, match='for a decoder say kind = "causal-lm"'):
        scorer(t5(tiny_decoder_folder))


def test_a_word_of_several_tokens_is_refused_with_its_pieces(tiny_decoder_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"true_token = 'yes no' is no token of .*tokenizer.json, which writes it as \['yes', 'Ġ"):
        scorer(decoder(tiny_decoder_folder, true_token="yes no"))


def test_one_token_for_both_answers_is_refused(tiny_decoder_folder: Path) -> None:
    with pytest.raises(ValueError, match="true_token and false_token are both 'yes'; name two"):
        scorer(decoder(tiny_decoder_folder, false_token="yes"))


def test_other_tokens_than_a_saved_logit_score_are_refused(tiny_decoder_folder: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(tiny_decoder_folder), device="cpu", model_kwargs={"dtype": "float32"})
    model.save_pretrained(str(tmp_path), create_model_card=False)
    yes, no = decoder_ids = teacher_identity(decoder(tmp_path))["token_ids"]

    assert decoder_ids == teacher_identity(decoder(tiny_decoder_folder))["token_ids"]
    with pytest.raises(ValueError, match=rf"have the ids \[{no}, {yes}\], but .*config.json scores by \[{yes}, {no}\]"):
        teacher_identity(decoder(tmp_path, true_token="no", false_token="yes"))


def test_scores_that_are_not_finite_are_refused(tiny_decoder_folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = Path(shutil.copytree(tiny_decoder_folder, tmp_path / "broken"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = np.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ValueError, match=r"teacher 'c': 1 of 1 scores are not finite \(first: pair 0, 'what is the heat' with"):
        scorer(decoder(folder)).score([(QUERY, PASSAGE)])


@pytest.mark.parametrize("damage", ["no weights", "pickled weights", "no tokenizer"])
def test_a_folder_without_safe_weights_or_a_tokenizer_is_refused(tiny_decoder_folder: Path, tmp_path: Path, damage: str) -> None:
    folder = Path(shutil.copytree(tiny_decoder_folder, tmp_path / "broken"))
    if damage == "pickled weights":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    else:
        (folder / ("model.safetensors" if damage == "no weights" else "tokenizer.json")).unlink()
    message = {"no weights": "no .*safetensors weights", "pickled weights": "is a pickle", "no tokenizer": "no tokenizer.json"}

    with pytest.raises(ValueError, match=message[damage]):
        scorer(decoder(folder))


# Recipe and key


@pytest.mark.parametrize("template", ["{query}", "{passage} {query} {query}", "nothing"])
def test_a_template_without_one_place_for_each_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"expected \{query\} and \{passage\}, once each"):
        decoder(Path("m"), template=template)


def test_an_instruction_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"instruction = 'find code' has no \{instruction\} in the template"):
        decoder(Path("m"), template=SHORT, instruction="find code")


@pytest.mark.parametrize(
    "fields",
    [
        {"template": SHORT},
        {"instruction": "find code"},
        {"true_token": "a", "false_token": "no"},
        {"false_token": ""},
        {"max_length": 512},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_whatever_changes_a_score_changes_the_key(tiny_decoder_folder: Path, fields: dict[str, Any]) -> None:
    key, changed = (key_of(teacher_identity(decoder(tiny_decoder_folder, **each))) for each in ({}, fields))

    assert key != changed


def test_name_gate_and_how_a_template_is_put_together_change_no_key(tiny_decoder_folder: Path) -> None:
    written = decoder(tiny_decoder_folder).template.replace("{instruction}", TASK)
    keys = {
        key_of(teacher_identity(decoder(tiny_decoder_folder, **each)))
        for each in ({}, {"name": "other"}, {"gate": False}, {"template": written})
    }

    assert len(keys) == 1
