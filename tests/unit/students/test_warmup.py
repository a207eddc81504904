"""The masked-LM warm-up of a head that starts as the identity: what it moves, that it helps, that it repeats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekd.recipe import Student
from sparsekd.students.building import build_student
from sparsekd.students.masked_lm import head_parameters
from sparsekd.students.routes import splade_route
from sparsekd.students.warmup import _mask, warm_up_head

Section = Callable[..., Student]
PASSAGES = ["the cat and the dog in the rain", "the river in the city and the bridge", "the king and the queen of england"]


@pytest.fixture
def build(student_section: Section, tiny_headless_folder: Path) -> Callable[..., Any]:
    """Return ``build(passages, **settings)``: a student that starts from the tiny encoder."""

    def make(passages: list[str] | None = None, **settings: Any) -> Any:
        return build_student(student_section(tiny_headless_folder, **settings), tiny_headless_folder, passages)

    return make


def test_only_the_head_moves(build: Callable[..., Any]) -> None:
    model, untouched = build(), build()

    warm_up_head(model, PASSAGES, 3)

    head = {id(parameter) for parameter in head_parameters(model[0].model)}
    assert len(head) == 5  # dense and norm with their biases, and the output bias
    for (name, parameter), other in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(parameter, other) is (id(parameter) not in head), name
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_the_head_learns_the_passages(build: Callable[..., Any]) -> None:
    first, last = warm_up_head(build(), PASSAGES, 60)

    assert last < 0.9 * first


@pytest.mark.parametrize("expansion", ["both", "query"])
def test_the_warm_up_repeats_whatever_was_drawn_before(build: Callable[..., Any], expansion: str) -> None:
    models = [build(expansion=expansion) for _ in range(2)]

    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        warm_up_head(model, PASSAGES, 3)

    heads = [head_parameters(splade_route(model)[1].model) for model in models]
    assert all(torch.equal(left, right) for left, right in zip(*heads, strict=True))


def test_building_warms_the_head_before_it_calibrates_the_bias(build: Callable[..., Any]) -> None:
    cold = build(PASSAGES, initial_active_dims=40)
    warm = build(PASSAGES, initial_active_dims=40, head_warmup_steps=5)

    for model in (cold, warm):
        assert int(model.encode_document(PASSAGES).to_dense().count_nonzero()) / len(PASSAGES) == pytest.approx(40, rel=0.1)
    assert not torch.allclose(cold.encode_document(PASSAGES).to_dense(), warm.encode_document(PASSAGES).to_dense(), atol=1e-3)


def test_masking_hides_fifteen_per_cent_of_words_and_no_special_token(build: Callable[..., Any]) -> None:
    model = build()
    tokenizer, features = model.tokenizer, model.preprocess([PASSAGES[0] * 4] * 300)
    before = features["input_ids"].clone()

    hidden, chosen, target = _mask(tokenizer, features, torch.Generator().manual_seed(0))

    special = torch.isin(before, torch.tensor(tokenizer.all_special_ids))
    share = float(chosen.sum() / (~special).sum())
    assert share == pytest.approx(0.15, abs=0.02)
    assert not bool((chosen & special).any())
    assert torch.equal(hidden[~chosen], before[~chosen])
    assert torch.equal(target, before[chosen])
    assert float((hidden[chosen] == tokenizer.mask_token_id).float().mean()) == pytest.approx(0.8, abs=0.05)
    assert float((hidden[chosen] == before[chosen]).float().mean()) == pytest.approx(0.1, abs=0.05)
    assert torch.equal(features["input_ids"], before)


def test_a_batch_of_single_words_still_hides_one(build: Callable[..., Any]) -> None:
    model = build()
    generator = torch.Generator().manual_seed(0)

    chosen = [int(_mask(model.tokenizer, model.preprocess(["cat"]), generator)[1].sum()) for _ in range(20)]

    assert chosen == [1] * 20


def test_passages_without_a_word_are_refused(build: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="head_warmup_steps: 32 passages in a row without a word of the vocabulary"):
        warm_up_head(build(), ["中", "文"], 1)


def test_a_tokenizer_without_a_mask_token_is_refused(tmp_path: Path, tiny_headless_folder: Path, student_section: Section) -> None:
    import json
    import shutil

    folder = tmp_path / "maskless"
    shutil.copytree(tiny_headless_folder, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["mask_token"] = None
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")

    with pytest.raises(ValueError, match=r"head_warmup_steps = 2: the tokenizer of .* has no mask token; set 0"):
        build_student(student_section(folder, head_warmup_steps=2), folder)
