"""Tiny models built in code, session-scoped, from a fixed seed and a fixed vocabulary; nothing comes from the network.

Heavy imports live inside the fixtures, so tests that ask for no model import no torch. A test that changes a model folder
copies it first. Hidden width 32, 2 layers, 2 heads; letters are in the vocabulary, so any lower-case word tokenises.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub, which reads it once
# Before any import of torch. Tests run a process per core: with two threads each they would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell that starts tests in the background has them ignore SIGINT, and so all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

PRELOADED = Path(__file__).with_name("preloaded.py")
collect_ignore = [PRELOADED.name]  # --doctest-modules would import it here

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


@pytest.fixture(autouse=True)
def own_log_handlers() -> Iterator[None]:
    """Take away the handlers that a stage run in this process has left: their stream ends with the test."""
    before, level = list(logging.root.handlers), logging.root.level
    yield
    logging.root.handlers[:] = [handler for handler in logging.root.handlers if handler in before]
    logging.root.setLevel(level)


_num_frozen_modules = 0


@pytest.fixture(autouse=True)
def imports_are_no_garbage() -> None:
    """Keep what imports have made out of the collector's sight: it takes .5 s to find nothing there, and a trainer asks it to."""
    global _num_frozen_modules
    if len(sys.modules) > _num_frozen_modules + 200:
        _num_frozen_modules = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def fork_server() -> None:
    """Start the process that ``forkserver`` processes are forked from, with the libraries imported; it ends with this one.

    An interpreter of its own costs 10 seconds of CPU for imports before a process does a second of work.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([PRELOADED.stem])
    source = PRELOADED.parents[1] / "src"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{source}{os.pathsep}{PRELOADED.parent}")
        multiprocessing.forkserver.ensure_running()


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


@pytest.fixture(scope="session")
def save_tiny_decoder() -> Callable[..., Path]:
    """Return ``save(folder, class_name="Qwen3ForCausalLM", **config)``: Qwen3 with a byte-level BPE of its own."""

    def save(folder: Path, class_name: str = "Qwen3ForCausalLM", **overrides: Any) -> Path:
        import tokenizers
        import torch
        import transformers

        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=special,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(["yes", "no"] * 100 + [f" {word}" for word in WORDS], trainer)
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[0])
        settings = {
            "vocab_size": len(fast),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "intermediate_size": 64,
            "max_position_embeddings": 1024,
            "initializer_range": 0.2,
            "tie_word_embeddings": True,
        }
        return _save(getattr(transformers, class_name), transformers.Qwen3Config(**{**settings, **overrides}), fast, folder, torch)

    return save


@pytest.fixture(scope="session")
def tiny_decoder_folder(tmp_path_factory: pytest.TempPathFactory, save_tiny_decoder: Callable[..., Path]) -> Path:
    """A Qwen3ForCausalLM with tied embeddings, whose vocabulary has ``yes`` and ``no``."""
    return save_tiny_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="session")
def tiny_t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5ForConditionalGeneration with a Unigram tokenizer whose vocabulary has ``▁true`` and ``▁false``."""
    import tokenizers
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("t5")
    words = ["true", "false", "Query:", "Document:", "Relevant:", *WORDS]
    characters = [*string.printable[:95], "▁"]
    vocabulary = [*(("▁" + word, -2.0 - number / 100) for number, word in enumerate(words)), *((each, -9.0) for each in characters)]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *vocabulary], unk_id=2)
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    config = transformers.T5Config(
        vocab_size=len(fast), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return _save(transformers.T5ForConditionalGeneration, config, fast, folder, torch)


def _save(model_class: Any, config: Any, tokenizer: Any, folder: Path, torch: Any) -> Path:
    """Save a model of random weights, drawn from a fixed seed, with its tokenizer."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = model_class(config).eval()
    torch.set_rng_state(state)  # a fixture must not decide what a test draws
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def save_tiny_multi_vector(tiny_headless_folder: Path) -> Callable[..., Path]:
    """Return ``save(folder, prompts=None, similarity="maxsim", skip=(), **transformer)``: a MultiVectorEncoder, 16 dims a token."""

    def save(
        folder: Path,
        *,
        prompts: dict[str, str] | None = None,
        similarity: str = "maxsim",
        skip: tuple[str, ...] = (),
        **transformer: Any,
    ) -> Path:
        import torch
        from sentence_transformers import MultiVectorEncoder
        from sentence_transformers.base.modules import Dense, Normalize, Transformer
        from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

        state = torch.get_rng_state()
        torch.manual_seed(0)
        projection = Dense(32, 16, bias=False, activation_function=torch.nn.Identity(), module_input_name="token_embeddings")
        torch.set_rng_state(state)
        modules = [
            Transformer(str(tiny_headless_folder), model_kwargs={"dtype": "float32"}, **transformer),
            projection,
            MultiVectorMask(skiplist_words=list(skip)),
            Normalize(module_input_name="token_embeddings"),
        ]
        model = MultiVectorEncoder(modules=modules, device="cpu", prompts=prompts, similarity_fn_name=similarity)
        model.save_pretrained(str(folder), create_model_card=False)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_multi_vector_folder(tmp_path_factory: pytest.TempPathFactory, save_tiny_multi_vector: Callable[..., Path]) -> Path:
    """A MultiVectorEncoder without prompts or query expansion."""
    return save_tiny_multi_vector(tmp_path_factory.mktemp("multi-vector"))
