"""Token ids of every text of a training set, made once and kept in Arrow, memory-mapped.

A text is known by the key of what the tokenizer reads, its prompt before it. The tokenizer, the length limit and the texts decide
the folder's key; on opening, a few texts are tokenised anew and must give what is kept. Costs the tokenizer's time once, 4 bytes
a token on disk, 16 bytes a text in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sparsekd.artifact import IntegrityError, find, fsync_path, key_of, publish, verify
from sparsekd.bank.text_key import text_keys

if TYPE_CHECKING:
    from sentence_transformers.sentence_transformer.modules import Transformer

logger = logging.getLogger(__name__)

TOKENS_VERSION = 1
"""Raised when the same fields would give other token ids."""
_FILE = "tokens.arrow"
_TEXTS_PER_BATCH = 4096
_TEXTS_PER_CALL = 256
_TEXTS_PROBED = 4
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(16), nullable=False),
        pa.field("token_ids", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("is_cut", pa.bool_(), nullable=False),
    ]
)


class TokenizedTexts:
    """Token ids, special tokens included, of a set of (prompt, text)."""

    def __init__(self, table: pa.Table) -> None:
        self._keys = _as_keys(b"".join(table.column("key").to_pylist()))
        chunks = [chunk for chunk in table.column("token_ids").chunks if len(chunk)]
        self._first_rows = np.cumsum([0, *(len(chunk) for chunk in chunks)])
        self._offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._values = [chunk.values.to_numpy() for chunk in chunks]
        self.num_cut = int(table.column("is_cut").to_numpy().sum()) if len(table) else 0
        """Texts that lost their end at the length limit."""

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._keys)

    def ids(self, texts: Sequence[str], prompt: str = "") -> list[NDArray[np.int32]]:
        """Return the int32 token ids of each text under ``prompt``, as views of the mapped file; KeyError for an unknown text."""
        keys = _keys_of(prompt + text for text in texts)
        rows = np.minimum(np.searchsorted(self._keys, keys), max(len(self) - 1, 0))
        is_known = self._keys[rows] == keys if len(self) else np.zeros(len(keys), dtype=bool)
        if not is_known.all():
            raise KeyError(f"not tokenised: {prompt + texts[int(np.argmin(is_known))][:40]!r}")
        chunks = np.searchsorted(self._first_rows, rows, side="right") - 1
        places = zip(chunks.tolist(), (rows - self._first_rows[chunks]).tolist(), strict=True)
        return [self._values[chunk][self._offsets[chunk][row] : self._offsets[chunk][row + 1]] for chunk, row in places]


def tokenized_texts(
    transformer: Transformer, texts_by_prompt: Mapping[str, Iterable[str]], *, cache: Path, task: str | None = None
) -> TokenizedTexts:
    """Find or make the token ids of every text under its prompt, at ``cache/tokens/KEY``.

    Token for token what ``transformer.preprocess`` gives. ValueError for a tokenizer that marks tokens with types other than 0;
    IntegrityError if what is kept is damaged or is not what the tokenizer gives now.
    """
    pairs = [(prompt, text) for prompt, texts in texts_by_prompt.items() for text in dict.fromkeys(texts)]
    keys = _keys_of(prompt + text for prompt, text in pairs)
    order = np.argsort(keys, kind="stable")
    order = order[np.append(True, keys[order][1:] != keys[order][:-1])] if len(order) else order  # the same under two prompts
    fields = {
        "stage": "tokens",
        "version": TOKENS_VERSION,
        "tokenizer": tokenizer_identity(transformer),
        "task": task,
        "texts": hashlib.sha256(keys[order].tobytes()).hexdigest(),
    }
    folder = cache / "tokens" / key_of(fields)
    hit = find(folder, fields)
    if hit is None:
        with publish(folder, kind="tokens", fields=fields, extra={"counts": {"texts": len(order)}}) as temporary:
            _write(temporary / _FILE, transformer, [pairs[place] for place in order], keys[order], task)
        hit = find(folder, fields)
        assert hit is not None
        logger.info("tokens %s: %d texts", hit.key, len(order))
    else:
        logger.info("tokens %s: hit, %d texts", hit.key, len(order))
    verify(hit)
    with pa.memory_map(str(hit.folder / _FILE)) as source:
        found = TokenizedTexts(pa.ipc.open_file(source).read_all())
    _probe(found, transformer, [pairs[place] for place in order[:_TEXTS_PROBED]], task, folder)
    return found


def tokenizer_identity(transformer: Transformer) -> dict[str, Any]:
    """Return what decides token ids: the tokenizer's own state, without what a call leaves in it, and the module's settings."""
    tokenizer: Any = transformer.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("truncation", None)  # of the last call
        state.pop("padding", None)
    else:
        state = {"vocabulary": tokenizer.get_vocab(), "settings": tokenizer.init_kwargs}
    text = json.dumps(state, sort_keys=True, default=str)
    return {
        "class": type(tokenizer).__name__,
        "state": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        "truncation_side": tokenizer.truncation_side,
        "max_length": transformer.max_seq_length,
        "module": json.loads(json.dumps(transformer.get_config_dict(), sort_keys=True, default=str)),
    }


def _write(
    path: Path, transformer: Transformer, pairs: Sequence[tuple[str, str]], keys: NDArray[np.bytes_], task: str | None
) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for start in range(0, len(pairs), _TEXTS_PER_BATCH):
            some = pairs[start : start + _TEXTS_PER_BATCH]
            token_ids = _tokenize(transformer, some, task)
            columns = [
                pa.array([key.tobytes() for key in _as_rows(keys[start : start + _TEXTS_PER_BATCH])], type=pa.binary(16)),
                pa.array(token_ids, type=_SCHEMA.field("token_ids").type),
                pa.array(_are_cut(transformer, some, token_ids), type=pa.bool_()),
            ]
            writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
    fsync_path(path)


def _tokenize(transformer: Transformer, pairs: Sequence[tuple[str, str]], task: str | None) -> list[NDArray[np.int32]]:
    """Return what the module's own ``preprocess`` gives, padding taken out."""
    token_ids: list[NDArray[np.int32]] = [np.empty(0, dtype=np.int32)] * len(pairs)
    for prompt in dict.fromkeys(prompt for prompt, _ in pairs):
        places = [place for place, pair in enumerate(pairs) if pair[0] == prompt]
        places.sort(key=lambda place: len(pairs[place][1]))
        for start in range(0, len(places), _TEXTS_PER_CALL):
            some = places[start : start + _TEXTS_PER_CALL]
            features = transformer.preprocess([pairs[place][1] for place in some], prompt=prompt or None, task=task)
            for place, ids in zip(some, _rows_of(features), strict=True):
                token_ids[place] = ids
    return token_ids


def _rows_of(features: Mapping[str, Any]) -> Iterator[NDArray[np.int32]]:
    types = features.get("token_type_ids")
    if types is not None and bool(types.any()):
        raise ValueError("the student's tokenizer marks tokens with types other than 0, which are not kept; take another model")
    ids = features["input_ids"].numpy().astype(np.int32)
    if "cu_seq_lens_q" in features:  # packed already
        starts = features["cu_seq_lens_q"].tolist()
        yield from (ids[0, start:end] for start, end in itertools.pairwise(starts))
    else:
        yield from (row[keep] for row, keep in zip(ids, features["attention_mask"].numpy().astype(bool), strict=True))


def _are_cut(transformer: Transformer, pairs: Sequence[tuple[str, str]], token_ids: Sequence[NDArray[np.int32]]) -> list[bool]:
    """Say of each text whether it has more tokens than the limit; only those that fill it are tokenised again, whole."""
    limit = transformer.max_seq_length
    full = [place for place, ids in enumerate(token_ids) if limit is not None and len(ids) >= limit]
    are_cut = [False] * len(pairs)
    if full:
        # A tokenizer warns of every text beyond its own limit, also when asked not to cut.
        tokenizer: Any = transformer.tokenizer
        whole = tokenizer(["".join(pairs[place]) for place in full], truncation=False, verbose=False)["input_ids"]
        for place, ids in zip(full, whole, strict=True):
            are_cut[place] = len(ids) > len(token_ids[place])
    return are_cut


def _probe(
    found: TokenizedTexts, transformer: Transformer, pairs: Sequence[tuple[str, str]], task: str | None, folder: Path
) -> None:
    for (prompt, text), expected in zip(pairs, _tokenize(transformer, pairs, task), strict=True):
        if not np.array_equal(found.ids([text], prompt)[0], expected):
            raise IntegrityError(f"{folder}: the tokenizer now gives other ids for {text[:40]!r}; remove the folder and rerun")


def _keys_of(texts: Iterable[str]) -> NDArray[np.bytes_]:
    return _as_keys(text_keys(texts).astype("<u8").tobytes())


def _as_keys(raw: bytes) -> NDArray[np.bytes_]:
    return np.frombuffer(raw, dtype="S16")


def _as_rows(keys: NDArray[np.bytes_]) -> NDArray[np.uint8]:
    return np.frombuffer(keys.tobytes(), dtype=np.uint8).reshape(-1, 16)
