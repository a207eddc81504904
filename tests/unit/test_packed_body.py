"""Models without padding against themselves with padding: outputs and gradients, for each architecture and each way to attend."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsekd import packed_body
from sparsekd.packed_body import flat_features, packable, packed, packed_attention, select_texts

LENGTHS = [3, 7, 1, 3, 3, 12, 7, 9]
TEXTS = (
    "a cat",
    "the river and the old bridge in the snow of the north",
    "x",
    "heart disease: which treatment, and at what risk for the patient",
    "two cats",
    "two words two words two words",
)
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
# The layers need no special tokens; only ids inside the tiny vocabulary, and one padding id for tokenizer and model.
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
DISTILBERT: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}
WINDOW: dict[str, Any] = {"local_attention": 8, "global_attn_every_n_layers": 2}  # 4 tokens either way in the second layer
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", SMALL),
    "distilbert": ("DistilBertForMaskedLM", DISTILBERT),
    "roberta": ("RobertaForMaskedLM", {**SMALL, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", {**SMALL, "type_vocab_size": 1}),
    "camembert": ("CamembertForMaskedLM", {**SMALL, "type_vocab_size": 1}),
    "electra": ("ElectraForMaskedLM", {**SMALL, "embedding_size": 16}),
    "modernbert": ("ModernBertForMaskedLM", {**SMALL, **WINDOW, "num_hidden_layers": 3}),
}

Build = Callable[..., Any]


@pytest.fixture(scope="session")
def build_splade(tmp_path_factory: pytest.TempPathFactory, tiny_headless_folder: Path) -> Build:
    """Return ``build(class name, seed=0, **config)``: a SparseEncoder of that masked-LM under max pooling, dropout off."""

    def build(name: str, *, seed: int = 0, **settings: Any) -> Any:
        import transformers
        from sentence_transformers import SparseEncoder
        from sentence_transformers.sparse_encoder.modules import SpladePooling, Transformer

        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_headless_folder)
        config_class = getattr(transformers, name).config_class
        config = config_class(vocab_size=len(tokenizer), max_position_embeddings=130, initializer_range=0.2, **TOKENS, **settings)
        folder = tmp_path_factory.mktemp(name)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        getattr(transformers, name)(config).eval().save_pretrained(folder)
        torch.set_rng_state(state)
        tokenizer.save_pretrained(folder)
        body = Transformer(str(folder), transformer_task="fill-mask")
        for module in body.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        pooling = SpladePooling("max", embedding_dimension=len(tokenizer))
        return SparseEncoder(modules=[body, pooling], device="cpu").train()

    return build


@pytest.fixture(scope="session")
def bert(build_splade: Build) -> Any:
    return build_splade("BertForMaskedLM", **SMALL)


def forward_and_backward(model: Any, texts: tuple[str, ...] = TEXTS) -> tuple[Tensor, dict[str, Tensor]]:
    """Return vectors and each parameter's gradient of a fixed weighted sum of them."""
    model.zero_grad(set_to_none=True)
    vectors = model(model.preprocess(list(texts)))["sentence_embedding"]
    weights = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1))
    (vectors * weights).sum().backward()
    return vectors.detach(), {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    # Of the largest gradient of all: that of a key's bias is zero but for rounding.
    tolerance = 1e-5 * max(1.0, *(float(value.abs().max()) for value in left.values()))
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-5, atol=tolerance, msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_vectors_and_gradients_without_padding_equal_those_with_it(build_splade: Build, architecture: str) -> None:
    name, settings = ARCHITECTURES[architecture]
    model = build_splade(name, **settings)
    plain, plain_gradients = forward_and_backward(model)

    with packed(model) as reasons:
        features = model.preprocess(list(TEXTS))
        vectors, gradients = forward_and_backward(model)

    assert reasons == {}
    assert features["input_ids"].shape == (1, int(features["cu_seq_lens_q"][-1]))
    torch.testing.assert_close(vectors, plain, rtol=1e-5, atol=1e-5)
    assert_equal(plain_gradients, gradients)


def test_modernbert_sees_through_its_window_only(build_splade: Build) -> None:
    name, settings = ARCHITECTURES["modernbert"]
    local, without = build_splade(name, **settings), build_splade(name, **{**settings, "local_attention": 256})

    with packed(local), packed(without):
        vectors = [forward_and_backward(model)[0] for model in (local, without)]

    assert float((vectors[0] - vectors[1]).abs().max()) > 1e-2  # so that the equality above says something about windows


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("MPNetForMaskedLM", SMALL, "its attention does not go through transformers' attention interface"),
        ("DebertaV2ForMaskedLM", SMALL, "its attention does not go through transformers' attention interface"),
        ("BertLMHeadModel", {**SMALL, "is_decoder": True}, "a decoder; only bidirectional encoders"),
    ],
)
def test_other_architectures_are_named_unpackable(name: str, settings: dict[str, Any], reason: str) -> None:
    import transformers

    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(vocab_size=50, **TOKENS, **settings))

    found = packable(model)

    assert found is not None
    assert found.startswith(f"{name}: {reason}")


def test_an_unpackable_model_keeps_its_padding_and_the_reason_is_said(
    build_splade: Build, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_splade("MPNetForMaskedLM", **SMALL)

    with caplog.at_level(logging.INFO), packed(model) as reasons:
        assert "attention_mask" in model.preprocess(list(TEXTS))

    assert list(reasons) == ["0"]
    assert "with padding: MPNetForMaskedLM" in caplog.text


def test_a_model_that_differs_without_padding_keeps_its_padding(build_splade: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_splade("BertForMaskedLM", **SMALL)
    monkeypatch.setattr(type(model[0]), "_infer_flatten_position_offset", lambda self: 5)

    with packed(model) as reasons:
        assert "attention_mask" in model.preprocess(list(TEXTS))

    assert "its outputs without padding differ by" in reasons["0"]


def test_padding_that_its_owner_asks_for_is_kept(build_splade: Build) -> None:
    model = build_splade("BertForMaskedLM", **SMALL)
    model[0].unpad_inputs = False

    with packed(model) as reasons:
        assert reasons == {"0": "BertForMaskedLM: unpad_inputs = False"}


def test_the_model_is_as_before_after_the_context(bert: Any) -> None:
    before = {key: value for key, value in vars(bert[0]).items() if not key.startswith("_modules")}
    implementation = bert[0].config._attn_implementation

    with pytest.raises(RuntimeError, match="stop"), packed(bert):
        raise RuntimeError("stop")

    assert {key: value for key, value in vars(bert[0]).items() if not key.startswith("_modules")} == before
    assert bert[0].config._attn_implementation == implementation
    assert bert.training
    assert all(module.training for module in bert.modules())


def test_a_model_saved_inside_the_context_is_plain(bert: Any, tmp_path: Path) -> None:
    from sentence_transformers import SparseEncoder

    with packed(bert):
        bert.save_pretrained(str(tmp_path), create_model_card=False)

    assert all(packed_body.ATTENTION not in path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.json"))
    again = SparseEncoder(str(tmp_path), device="cpu")
    left, right = (model.encode_document(list(TEXTS), convert_to_sparse_tensor=False) for model in (bert, again))
    bert.train()
    assert torch.equal(left, right)


def test_padded_features_are_still_taken_inside_the_context(bert: Any, build_splade: Build) -> None:
    name, settings = ARCHITECTURES["modernbert"]
    for model in (bert, build_splade(name, **settings)):
        for texts in (TEXTS, TEXTS[1:2]):
            features = model.preprocess(list(texts))
            plain = model(dict(features))["sentence_embedding"]

            with packed(model):
                vectors = model(dict(features))["sentence_embedding"]

            torch.testing.assert_close(vectors, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_features_from_token_ids_are_those_of_the_tokenizer(build_splade: Build, architecture: str) -> None:
    name, settings = ARCHITECTURES[architecture]
    model = build_splade(name, **settings)
    with packed(model):
        expected = model.preprocess(list(TEXTS))

        found = flat_features(model.tokenizer(list(TEXTS))["input_ids"], model[0])

    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(found[key], value), key
            assert found[key].dtype == value.dtype
        else:
            assert found[key] == value


def test_selected_texts_have_the_features_of_their_own(bert: Any) -> None:
    chosen = [4, 0, 3]
    with packed(bert):
        expected = bert.preprocess([TEXTS[text] for text in chosen])

        found = select_texts(bert.preprocess(list(TEXTS)), chosen)

    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value, key


def test_a_text_without_tokens_is_refused(bert: Any) -> None:
    with pytest.raises(ValueError, match="a text without tokens; expected special tokens at least"):
        flat_features([[2, 3], []], bert[0])


def test_dense_encoders_pool_the_same_without_padding(tiny_encoder_folder: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    model = SentenceTransformer(str(tiny_encoder_folder), device="cpu")
    for mode in ("mean", "cls", "max"):
        model[1] = Pooling(32, mode)
        plain = model.encode(list(TEXTS), prompt="the ")

        with packed(model):
            vectors = model.encode(list(TEXTS), prompt="the ")

        torch.testing.assert_close(torch.tensor(vectors), torch.tensor(plain), rtol=1e-5, atol=1e-5)


def test_a_model_with_nan_is_not_refused_here(build_splade: Build) -> None:
    model = build_splade("BertForMaskedLM", **SMALL)
    with torch.no_grad():
        model[0].model.get_input_embeddings().weight[5] = torch.nan  # the word "a", which the probe holds

    with packed(model) as reasons:
        assert reasons == {}


def test_gradcache_cuts_packed_features_into_mini_batches(bert: Any) -> None:
    from sentence_transformers.base.losses.gradcache import _create_minibatch

    with packed(bert):
        features = bert.preprocess(list(TEXTS))
        whole = bert(dict(features))["sentence_embedding"]
        parts = [bert(_create_minibatch(features, start, start + 2))["sentence_embedding"] for start in (0, 2, 4)]

    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(build_splade: Build) -> None:
    model = build_splade("BertForMaskedLM", **SMALL)
    plain, plain_gradients = forward_and_backward(model)
    model[0].model.activation_checkpointing_enable({"use_reentrant": False})

    with packed(model):
        vectors, gradients = forward_and_backward(model)

    torch.testing.assert_close(vectors, plain, rtol=1e-5, atol=1e-5)
    assert_equal(plain_gradients, gradients)


def test_autocast_multiplies_in_half_precision(bert: Any) -> None:
    plain, _ = forward_and_backward(bert)

    with packed(bert), torch.autocast("cpu", torch.bfloat16):
        vectors, _ = forward_and_backward(bert)

    assert vectors.dtype == torch.bfloat16
    torch.testing.assert_close(vectors.float(), plain, rtol=0.1, atol=0.1)
    assert not torch.equal(vectors.float(), plain)


def draw(num_heads: int = 2, num_key_heads: int = 2) -> list[Tensor]:
    """Return query, key, value [1, H, T, 8] of texts of LENGTHS, laid out as a linear layer's output is."""
    generator = torch.Generator().manual_seed(0)
    heads = (num_heads, num_key_heads, num_key_heads)
    return [torch.randn(1, sum(LENGTHS), count, 8, generator=generator).transpose(1, 2).requires_grad_() for count in heads]


def text_by_text(states: list[Tensor], window: int | None, scaling: float | None) -> Tensor:
    """Softmax attention written out, one text after the other: [1, T, H, D]."""
    outputs = []
    for query, key, value in zip(*(state.split(LENGTHS, dim=2) for state in states), strict=True):
        grouped = query.shape[1] // key.shape[1]
        key, value = (state.repeat_interleave(grouped, dim=1) for state in (key, value))
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        place = torch.arange(query.shape[2])
        if window is not None:
            scores = scores.masked_fill((place[:, None] - place).abs() >= window, -torch.inf)
        outputs.append(scores.softmax(-1) @ value)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def attend(states: list[Tensor], **settings: Any) -> Tensor:
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    output, _ = packed_attention(torch.nn.Module(), *states, None, cu_seq_lens_q=ends, max_length_q=max(LENGTHS), **settings)
    return output


@pytest.fixture(params=["runs", "reordered", "padded"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each way to attend that a CPU can run, forced."""
    monkeypatch.setattr(packed_body, "_TOKENS_PER_CALL", {"runs": 0.001, "reordered": 1e9}.get(request.param, 24))
    if request.param == "padded":
        monkeypatch.setattr(packed_body, "_attend_by_length", packed_body._attend_padded)
    return request.param


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("num_key_heads", [4, 2, 1])
def test_attention_equals_softmax_written_out(way: str, window: int | None, scaling: float | None, num_key_heads: int) -> None:
    states, references = draw(4, num_key_heads), draw(4, num_key_heads)
    expected = text_by_text(references, window, scaling)

    output = attend(states, sliding_window=window, scaling=scaling)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * weights).sum().backward()
    (expected * weights).sum().backward()

    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    for state, reference in zip(states, references, strict=True):
        torch.testing.assert_close(state.grad, reference.grad, rtol=1e-5, atol=1e-5)


def test_attention_dropout_drops_and_keeps_the_mean(way: str) -> None:
    states = draw()
    states[2] = torch.ones_like(states[2])  # every output is the sum of the kept weights, 1 in the mean

    torch.manual_seed(0)
    outputs = torch.stack([attend(states, dropout=0.5) for _ in range(300)])

    assert not torch.allclose(outputs[0], outputs[1])
    assert float(outputs.detach().mean()) == pytest.approx(1.0, abs=0.02)


def test_dropout_of_the_config_acts_in_training_only(build_splade: Build) -> None:
    model = build_splade("BertForMaskedLM", **SMALL)
    for layer in model[0].model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.5

    with packed(model):
        training = [model(model.preprocess(list(TEXTS)))["sentence_embedding"] for _ in range(2)]
        model.eval()
        encoding = [model(model.preprocess(list(TEXTS)))["sentence_embedding"] for _ in range(2)]

    assert not torch.equal(*training)
    assert torch.equal(*encoding)
