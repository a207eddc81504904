"""A sparse encoder as a teacher: the vectors of a sentence-transformers SparseEncoder, any kind of it, and their bank.

SPLADE, inference-free (a router with a table for queries) and CSR models are encoded through their own encode_query and
encode_document; prompts are the recipe's. Vectors are scipy CSR, float32 [n, V], 8 bytes per active dim; no more than one dense
block of them at a time. The model is loaded at the first text that needs it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.bank.sharing import Positions
from sparsekd.bank.sparse import SparseBank
from sparsekd.bank.text_key import text_keys
from sparsekd.model_reference import resolve
from sparsekd.recipe import EncoderSpec, Run
from sparsekd.teachers.batching import BLOCK, length_batches
from sparsekd.teachers.embedding import bank_texts
from sparsekd.teachers.identity import sparse_identity
from sparsekd.teachers.keys import unique_keys
from sparsekd.teachers.loading import length_limit, model_arguments, require_unchanged
from sparsekd.teachers.protocols import Role

if TYPE_CHECKING:
    import scipy.sparse

_log = logging.getLogger(__name__)

_TASK_BY_ROLE: dict[Role, str] = {"query": "query", "passage": "document"}
_BLOCK_LOGITS = 1 << 26  # a masked-LM gives a logit per token and term: 268 MB at once, and a copy of it under the mask
_BLOCK_ROWS = 256  # dense vectors at once: 31 MB at 30,522 terms


class SparseTeacher:
    """Encodes texts in token-budget batches of near-equal length."""

    def __init__(self, spec: EncoderSpec, run: Run) -> None:
        self.identity: dict[str, Any] = sparse_identity(spec)
        self.reference = spec.model
        self.num_truncated = 0
        self._spec = spec
        self._run = run
        self._model: Any = None
        self._dimension: int | None = None

    @property
    def dimension(self) -> int:
        """Width V of a vector; loads the model, and encodes a word with it.

        What the model declares is not asked: a SpladePooling saved without its width lets the transformer's answer stand.
        """
        if self._dimension is None:
            vector = self._loaded().encode_document("a", prompt="", convert_to_sparse_tensor=False, show_progress_bar=False)
            self._dimension = len(vector)
        return self._dimension

    def encode(self, texts: Sequence[str], *, role: Role) -> scipy.sparse.csr_matrix:
        """Return float32 CSR [n, V] in input order, as the model's encode_query or encode_document gives them.

        Texts longer than the limit are cut by the model and counted in ``num_truncated``. Raises ValueError if a weight is not
        finite, naming how many vectors and the first text.
        """
        import scipy.sparse

        model = self._loaded()
        prompt = self.identity[f"{role}_prompt"]
        encode = model.encode_query if role == "query" else model.encode_document
        lengths = self._token_lengths([prompt + text for text in texts], role)
        budget = max(1, min(self._run.batch_tokens, _BLOCK_LOGITS // self.dimension))
        order, parts = [np.empty(0, dtype=np.int64)], [scipy.sparse.csr_matrix((0, self.dimension), dtype=np.float32)]
        for batch in length_batches(lengths, budget):
            for first in range(0, len(batch), _BLOCK_ROWS):
                rows = batch[first : first + _BLOCK_ROWS]
                # prompt="" means none: left out, the model's own prompt for the role would apply.
                vectors = encode(
                    [texts[row] for row in rows],
                    prompt=prompt,
                    batch_size=len(rows),
                    convert_to_sparse_tensor=False,
                    show_progress_bar=False,
                )
                order.append(rows)
                parts.append(_to_csr(vectors))
        vectors = scipy.sparse.vstack(parts, format="csr")[np.argsort(np.concatenate(order))]
        self._refuse_non_finite(vectors, texts, role)
        return vectors

    def _token_lengths(self, texts: list[str], role: Role) -> NDArray[np.int64]:
        """Count tokens, special ones included, cut at the role's limit; what is cut is counted."""
        if not texts:
            return np.empty(0, dtype=np.int64)
        module = _input_module(self._loaded(), role)
        tokens = module.tokenizer(texts, truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
        lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
        limit = module.max_seq_length
        if limit is None:
            return lengths
        num_truncated = int((lengths > limit).sum())
        if num_truncated and not self.num_truncated:
            _log.warning("teacher %s: texts over %d tokens are cut by the model and counted", self._spec.model, limit)
        self.num_truncated += num_truncated
        return np.minimum(lengths, int(min(limit, np.iinfo(np.int64).max)))

    def _loaded(self) -> Any:
        if self._model is None:
            self._model = self._load()
        return self._model

    def _load(self) -> Any:
        arguments = model_arguments(self._spec, self._run)  # first: a wrong device is refused before the slow import
        from sentence_transformers import SparseEncoder

        folder = resolve(self._spec.model).path
        _refuse_fresh_heads(self._spec, folder)
        model = SparseEncoder(str(folder), **arguments)
        require_unchanged(self._spec.model, self.identity)
        for role in _TASK_BY_ROLE:
            module = _input_module(model, role)
            if hasattr(module, "config"):  # a table of weights has no positions
                length_limit(module, self._spec)
            if self._spec.max_length is not None:
                module.max_seq_length = self._spec.max_length
        return model.eval()

    def _refuse_non_finite(self, vectors: scipy.sparse.csr_matrix, texts: Sequence[str], role: Role) -> None:
        bad = np.flatnonzero(~np.isfinite(vectors.data))
        if bad.size:
            rows = np.unique(np.searchsorted(vectors.indptr, bad, side="right") - 1)
            raise ValueError(
                f"teacher {self._spec.model!r}: {len(rows)} of {len(texts)} {role} vectors are not finite (first: text {rows[0]}, "
                f"{texts[rows[0]][:80]!r}); expected finite values from {self._spec.dtype} weights; try dtype = \"float32\""
            )


def banked_sparse_vectors(
    teacher: SparseTeacher, bank: SparseBank, texts: Sequence[str], role: Role, run: Run
) -> scipy.sparse.csr_matrix:
    """Return float32 CSR [n, V] in input order, encoding only texts that are not banked and committing every ``run.shard_pairs``.

    The bank's key of a text is that of what the model reads, prompt + text; roles are banked apart, since a router sends them
    through different modules. Loads the model only if a text is missing, and no process that asks for the same texts meanwhile
    encodes them too.
    """
    import scipy.sparse

    if not texts:
        return scipy.sparse.csr_matrix((0, teacher.dimension), dtype=np.float32)
    prompt = teacher.identity[f"{role}_prompt"]
    banked = bank.open({**teacher.identity, "role": role}, reference=teacher.reference)
    keys, first, inverse = unique_keys(text_keys(prompt + text for text in texts))
    unique = [texts[position] for position in first.tolist()]

    def encode(shard: Positions, done: Callable[[int], object]) -> None:
        blocks = []
        for begin in range(0, len(shard), BLOCK):
            block = shard[begin : begin + BLOCK]
            blocks.append(teacher.encode([unique[position] for position in block.tolist()], role=role))
            done(len(block))
        banked.append(keys[shard], scipy.sparse.vstack(blocks, format="csr"))

    bank_texts(banked, keys, unique, encode, teacher, role, run)
    return banked.lookup(keys)[1][inverse]


def pairwise_dot(left: scipy.sparse.csr_matrix, right: scipy.sparse.csr_matrix) -> NDArray[np.float32]:
    """Return float32 [n]: dot product of row i with row i, summed in float64; a row's result depends on that row alone."""
    return np.asarray(left.multiply(right).sum(axis=1, dtype=np.float64), dtype=np.float32).reshape(-1)


def teacher_vocabulary(spec: EncoderSpec) -> dict[str, int] | None:
    """Return the position of each term among a teacher's dims, read from its tokenizer without loading the model.

    None where dims are no terms (an autoencoder's). Raises ValueError if the folder has no tokenizer.json.
    """
    folder = resolve(spec.model).path
    if any(module.endswith("SparseAutoEncoder") for module in _module_types(folder)):
        return None
    found = sorted(folder.rglob("tokenizer.json"))
    if not found:
        raise ValueError(
            f"model {spec.model!r}: {folder} has no tokenizer.json, so nothing says which term a dim is; save the model again "
            "with its fast tokenizer"
        )
    from tokenizers import Tokenizer

    vocabulary: dict[str, int] = Tokenizer.from_file(str(found[0])).get_vocab(with_added_tokens=True)
    return vocabulary


def _module_types(folder: Path) -> list[str]:
    """Class names of a model's modules, those of a router's routes included."""
    types = [module["type"] for module in json.loads((folder / "modules.json").read_text(encoding="utf-8"))]
    for path in folder.rglob("router_config.json"):
        types += list(json.loads(path.read_text(encoding="utf-8"))["types"].values())
    return types


def _input_module(model: Any, role: Role) -> Any:
    """The module that tokenises texts of a role."""
    first = model[0]
    routes = getattr(first, "sub_modules", None)
    return first if routes is None else routes[_TASK_BY_ROLE[role]][0]


def _refuse_fresh_heads(spec: EncoderSpec, folder: Path) -> None:
    """Refuse a masked-LM without its head's weights, which transformers fills with random ones and a line in the log."""
    from transformers import AutoModelForMaskedLM

    for path in sorted(folder.rglob("sentence_bert_config.json")):
        if json.loads(path.read_text(encoding="utf-8")).get("transformer_task") != "fill-mask":
            continue
        _, report = AutoModelForMaskedLM.from_pretrained(
            str(path.parent),
            device_map="meta",  # reads names and shapes, allocates nothing
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=spec.trust_remote_code,
        )
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(
                f"teacher {spec.model!r}: {path.parent} lacks {len(missing)} weights ({', '.join(missing[:4])}), which would be "
                "drawn at random; expected a trained SparseEncoder"
            )


def _to_csr(vectors: Any) -> scipy.sparse.csr_matrix:
    """Take the active dims of a dense tensor out on its device; only they are copied."""
    import scipy.sparse

    rows, terms = vectors.nonzero(as_tuple=True)
    counts = rows.bincount(minlength=len(vectors)).cpu().numpy()
    data = vectors[rows, terms].float().cpu().numpy()
    starts = np.concatenate(([0], np.cumsum(counts)))
    return scipy.sparse.csr_matrix((data, terms.int().cpu().numpy(), starts), shape=tuple(vectors.shape))
