"""The untrained student a recipe asks for: a sentence-transformers SparseEncoder, saved as one, loaded without this project."""

from __future__ import annotations

import hashlib
import heapq
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsekd.recipe import Student
from sparsekd.students.adapters import add_adapters, check_adapters
from sparsekd.students.body import check_vocabulary, load_tokenizer
from sparsekd.students.calibration import calibrate_bias
from sparsekd.students.csr import csr_modules
from sparsekd.students.masked_lm import has_masked_lm_head, load_masked_lm
from sparsekd.students.routes import static_route
from sparsekd.students.static import fit_vocabulary, start_from_idf, static_embedding
from sparsekd.students.warmup import PASSAGES_PER_STEP, check_can_warm_up, warm_up_head

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Module
    from sentence_transformers.sparse_encoder.modules import Router

logger = logging.getLogger(__name__)

_SEED = 0
_CALIBRATION_PASSAGES = 128  # over whole collections they gave 119.6 for 120 and 200.4 for 200


def build_student(student: Student, folder: Path, passages: Sequence[str] | None = None) -> SparseEncoder:
    """Return the untrained student in float32 on CPU, in evaluation mode, its similarity the dot product.

    ``folder`` holds the starting weights: for splade a transformers masked-LM, or an encoder without a head (a
    sentence-transformers folder with its transformer at the root is one); for csr a dense encoder. ``passages`` are the
    collection's, in any order, for what starts from them: IDF weights, the head's warm-up, the output bias. Without them those
    three are left out, which checks a recipe but makes no student to train. Raises ValueError where it cannot be built.
    """
    check_adapters(student)
    # What starts at random (an autoencoder, adapters) starts the same each time, and takes no draw from the run's own generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return _built(student, folder, passages)


def _built(student: Student, folder: Path, passages: Sequence[str] | None) -> SparseEncoder:
    from sentence_transformers import SparseEncoder

    modules: list[Any] = csr_modules(student, folder) if student.kind == "csr" else _splade_modules(student, folder)
    prompts = {"query": student.query_prompt, "document": student.passage_prompt}
    model = SparseEncoder(modules=modules, prompts=prompts, similarity_fn_name="dot", device="cpu")
    _check_width(student, int(model.get_embedding_dimension() or 0))
    model.eval()
    if passages is not None and student.kind == "splade":
        _start_from_passages(model, student, passages)
    if student.lora_rank is not None:
        add_adapters(model, student)
    return model.eval()


def _splade_modules(student: Student, folder: Path) -> list[Module]:
    from sentence_transformers.sparse_encoder.modules import SpladePooling, Transformer

    _check_head(student, folder)
    tokenizer = load_tokenizer(student, folder)
    masked_lm = load_masked_lm(student, folder)
    check_vocabulary(student, tokenizer, masked_lm)
    if student.head_warmup_steps:
        check_can_warm_up(student, tokenizer)
    if student.expansion != "both":
        fit_vocabulary(student, tokenizer, masked_lm)
    with tempfile.TemporaryDirectory() as place:
        masked_lm.save_pretrained(place)
        tokenizer.save_pretrained(place)
        transformer = Transformer(place, transformer_task="fill-mask", model_kwargs={"dtype": torch.float32})
    transformer.max_seq_length = student.max_length
    modules: list[Module] = [transformer, SpladePooling("max", embedding_dimension=masked_lm.config.vocab_size)]
    return modules if student.expansion == "both" else [_router(student, folder, modules)]


def _router(student: Student, folder: Path, splade: list[Module]) -> Router:
    """Return a router without a default, so that a text of neither side is an error."""
    from sentence_transformers.sparse_encoder.modules import Router

    static: list[Module] = [static_embedding(student, folder)]
    query, document = (static, splade) if student.expansion == "passage" else (splade, static)
    router: Router = Router.for_query_document(query, document, default_route=None, allow_empty_key=False)
    return router


def _check_head(student: Student, folder: Path) -> None:
    """Raise ValueError if the recipe would set the bias of, or warm up, a head that is trained already."""
    if not has_masked_lm_head(folder):
        return
    if student.initial_active_dims is not None:
        raise ValueError(
            f"[student] initial_active_dims: {student.model} brings a trained masked-LM head, whose bias is left alone; "
            "remove the key"
        )
    if student.residual_scale != 1:
        raise ValueError(
            f"[student] residual_scale = {student.residual_scale:g}: {student.model} brings a trained masked-LM head, which "
            "expects the body as it is; remove the key"
        )
    if student.head_warmup_steps:
        raise ValueError(
            f"[student] head_warmup_steps: {student.model} brings a trained masked-LM head, which needs no warm-up; remove the key"
        )


def _check_width(student: Student, width: int) -> None:
    """Raise ValueError if the recipe asks for more active dims than there are."""
    if student.initial_active_dims is not None and student.initial_active_dims >= width:
        raise ValueError(f"[student] initial_active_dims = {student.initial_active_dims}: the vocabulary has {width}; lower it")
    for name in ("query_active_dims", "passage_active_dims"):
        asked = getattr(student.budget, name, None)
        if asked is not None and asked > width:
            raise ValueError(f"[student.budget] {name} = {asked:g}: the vocabulary has {width}; lower it")


def _start_from_passages(model: SparseEncoder, student: Student, passages: Sequence[str]) -> None:
    """Set what starts from the collection: the table, then the head, and last the bias, which sees the warm head."""
    if not passages:
        raise ValueError(f"[student] {student.model}: the collection has no passages to start from")
    static = static_route(model)
    if static is not None and student.static_weights == "idf":
        start_from_idf(static[1], passages)
        logger.info("student: %s table from the IDF of %d passages", static[0], len(passages))
    if student.head_warmup_steps:
        sample = _sample(passages, student.head_warmup_steps * PASSAGES_PER_STEP)
        first, last = warm_up_head(model, sample, student.head_warmup_steps)
        logger.info("student: head warmed up, masked-LM loss %.3f to %.3f", first, last)
    if student.initial_active_dims is not None:
        bias = calibrate_bias(model, _sample(passages, _CALIBRATION_PASSAGES), student.initial_active_dims)
        logger.info("student: output bias %.3f for %d active dims per passage", bias, student.initial_active_dims)


def _sample(passages: Sequence[str], count: int) -> list[str]:
    """Return the passages of smallest sha256, so that their order in the file changes nothing."""
    return heapq.nsmallest(count, passages, key=lambda text: hashlib.sha256(text.encode()).digest())
