"""CSR students (arXiv 2503.01776): a sparse autoencoder over a dense encoder, k active dims a text, by dot product."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsekd.recipe import Student
from sparsekd.students.body import changed_config, check_missing, check_positions, check_vocabulary, config_changes, load_tokenizer

if TYPE_CHECKING:
    from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

_LATENTS = 4  # of the dense width, the library's own default


def csr_modules(student: Student, folder: Path) -> list[Any]:
    """Return the dense encoder's modules in float32 with an autoencoder behind them.

    ``folder`` is a sentence-transformers folder, taken with its pooling and what follows, or a transformers encoder, then with
    mean pooling. Raises ValueError where it is neither, and where ``k`` or ``k_aux`` does not fit ``hidden_dim``.
    """
    dense = _saved_modules(student, folder) if (folder / "modules.json").is_file() else _plain_modules(student, folder)
    transformer: Any = dense[0]
    check_vocabulary(student, transformer.tokenizer, transformer.model)
    check_positions(student, transformer.model)
    transformer.max_seq_length = student.max_length
    width = next(int(module.get_embedding_dimension()) for module in reversed(dense) if hasattr(module, "get_embedding_dimension"))
    autoencoder = _autoencoder(student, width)
    if student.freeze_body:
        for module in dense:
            module.requires_grad_(False)
    return [*dense, autoencoder]


def _autoencoder(student: Student, width: int) -> SparseAutoEncoder:
    from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

    hidden_dim = student.hidden_dim or _LATENTS * width
    shown = f"hidden_dim = {hidden_dim}" if student.hidden_dim else f"hidden_dim = {hidden_dim}, {_LATENTS} times the encoder's"
    if student.k > hidden_dim:
        raise ValueError(f"[student] k = {student.k}: the vectors have only {shown}; lower k or raise hidden_dim")
    if 4 * student.k > hidden_dim:
        raise ValueError(
            f"[student] k = {student.k}: CSR training also reconstructs from the best 4k = {4 * student.k} dims, and there are "
            f"only {shown}; lower k to {hidden_dim // 4} or raise hidden_dim"
        )
    if student.k_aux > hidden_dim:
        raise ValueError(f"[student] k_aux = {student.k_aux}: the vectors have only {shown}; lower k_aux or raise hidden_dim")
    return SparseAutoEncoder(width, hidden_dim=hidden_dim, k=student.k, k_aux=student.k_aux)


def _plain_modules(student: Student, folder: Path) -> list[Any]:
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    _check_weights(student, folder)
    load_tokenizer(student, folder)
    transformer = Transformer(str(folder), model_kwargs={"dtype": torch.float32}, config_kwargs=config_changes(student, folder))
    return [transformer, Pooling(transformer.get_embedding_dimension(), "mean")]


def _saved_modules(student: Student, folder: Path) -> list[Any]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    listed = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    body = folder / listed[0]["path"]
    if not (body / "config.json").is_file():
        raise ValueError(
            f"[student] {student.model}: its first module is {listed[0]['type']}; a csr student needs a Transformer there"
        )
    _check_weights(student, body)
    load_tokenizer(student, body)
    encoder = SentenceTransformer(
        str(folder),
        device="cpu",
        local_files_only=True,
        model_kwargs={"dtype": torch.float32},
        config_kwargs=config_changes(student, body),
    )
    modules = list(encoder.children())
    known = (Transformer, Pooling, Dense, Normalize)
    names = [module["type"].rpartition(".")[2] for module in listed]  # the library makes a dense encoder of whatever it is given
    if names != [type(module).__name__ for module in modules] or not all(isinstance(module, known) for module in modules):
        raise ValueError(
            f"[student] {student.model}: not a dense encoder but {names}; expected a Transformer, a Pooling, and behind them Dense "
            "or Normalize at most"
        )
    leaves_prompt_out = any(isinstance(module, Pooling) and not module.include_prompt for module in modules)
    if leaves_prompt_out and (student.query_prompt or student.passage_prompt):
        raise ValueError(
            f"[student] {student.model}: its pooling leaves prompts out, which training on token ids cannot; remove query_prompt "
            "and passage_prompt, or choose another model"
        )
    return modules


def _check_weights(student: Student, folder: Path) -> None:
    """Raise ValueError if the body's weights are not all there; a pooler that nothing here asks may be missing."""
    from transformers import AutoModel

    _, report = AutoModel.from_pretrained(
        folder, config=changed_config(student, folder), dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    check_missing(student, sorted(name for name in report["missing_keys"] if not name.startswith("pooler.")))
