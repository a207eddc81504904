"""Tiny models built in code, session-scoped, from a fixed seed and a fixed vocabulary; nothing comes from the network.

Heavy imports live inside the fixtures, so tests that ask for no model import no torch. A test that changes a model folder
copies it first. Hidden width 32, 2 layers, 2 heads; letters are in the vocabulary, so any lower-case word tokenises.
"""

from __future__ import annotations

import os
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub, which reads it once
# Before any import of torch. Tests run a process per core: with two threads each they would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = (
    "a an the of in to and is are for on at by with from what which who where when how why does do did was were be it this "
    "that not no or one two many most more than first last old new long small big city river school party law war century "
    "state government people world year name power water heat flow air wing body wave shock pressure speed temperature "
    "boundary layer theory method problem result cell blood heart disease treatment symptom cause patient doctor risk test "
    "cancer diet vitamin food health child woman man gene type cat dog bird fish rain snow sun mountain bridge tower king "
    "queen norman france england warsaw oxygen computer number prime time day system study book music game team player"
).split()


def tiny_vocabulary() -> list[str]:
    """Return the special tokens, the words, then single letters, digits and marks with their ``##`` continuations."""
    single = list(string.ascii_lowercase + string.digits + string.punctuation)
    return [*SPECIAL_TOKENS, *WORDS, *single[1:], *(f"##{character}" for character in single)]


@pytest.fixture(scope="session")
def sample_folder() -> Path:
    """The tiny collection of the repository, in BEIR layout."""
    return Path(__file__).resolve().parents[1] / "data" / "sample"


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """Return a function that makes the BertConfig of every tiny model, with overrides by keyword."""

    def make(**overrides: Any) -> Any:
        from transformers import BertConfig

        settings = {
            "vocab_size": len(tiny_vocabulary()),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,  # wide enough that different texts get visibly different scores
        }
        return BertConfig(**{**settings, **overrides})

    return make


@pytest.fixture(scope="session")
def save_tiny_model(tiny_config: Callable[..., Any]) -> Callable[..., Path]:
    """Return ``save(class_name, folder, seed=0, **config)``: a plain transformers folder, weights and tokenizer."""

    def save(class_name: str, folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
        import torch
        import transformers

        state = torch.get_rng_state()
        torch.manual_seed(seed)
        model = getattr(transformers, class_name)(tiny_config(**overrides)).eval()
        torch.set_rng_state(state)  # a fixture must not decide what a test draws
        model.save_pretrained(folder)
        vocabulary = {token: number for number, token in enumerate(tiny_vocabulary())}
        tokenizer = transformers.BertTokenizerFast(vocab=vocabulary, do_lower_case=True, model_max_length=128)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_headless_folder(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Callable[..., Path]) -> Path:
    """A BertModel and its tokenizer: no head, no pooling."""
    return save_tiny_model("BertModel", tmp_path_factory.mktemp("headless"))


@pytest.fixture(scope="session")
def tiny_masked_lm_folder(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Callable[..., Path]) -> Path:
    """A BertForMaskedLM with tied embeddings and its tokenizer."""
    return save_tiny_model("BertForMaskedLM", tmp_path_factory.mktemp("masked-lm"))


@pytest.fixture(scope="session")
def tiny_encoder_folder(tmp_path_factory: pytest.TempPathFactory, tiny_headless_folder: Path) -> Path:
    """A SentenceTransformer: BertModel, mean pooling, no normalisation, dot product."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("encoder")
    body = Transformer(str(tiny_headless_folder))
    model = SentenceTransformer(
        modules=[body, Pooling(body.get_embedding_dimension(), "mean")], device="cpu", similarity_fn_name="dot"
    )
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="session")
def tiny_splade_folder(tmp_path_factory: pytest.TempPathFactory, tiny_masked_lm_folder: Path) -> Path:
    """A saved SparseEncoder: BertForMaskedLM under max pooling, dot product, a prompt of its own for queries."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import SpladePooling, Transformer

    folder = tmp_path_factory.mktemp("splade")
    body = Transformer(str(tiny_masked_lm_folder), transformer_task="fill-mask", model_kwargs={"dtype": "float32"})
    prompts = {"query": "what is ", "document": ""}
    model = SparseEncoder(modules=[body, SpladePooling("max")], prompts=prompts, device="cpu", similarity_fn_name="dot")
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="session")
def tiny_cross_encoder_folder(tmp_path_factory: pytest.TempPathFactory, save_tiny_model: Callable[..., Path]) -> Path:
    """A CrossEncoder: BertForSequenceClassification with one label, saved with the library's default activation, Sigmoid."""
    from sentence_transformers import CrossEncoder

    plain = save_tiny_model("BertForSequenceClassification", tmp_path_factory.mktemp("classifier"), num_labels=1)
    folder = tmp_path_factory.mktemp("cross-encoder")
    CrossEncoder(str(plain), device="cpu").save_pretrained(str(folder), create_model_card=False)
    return folder
