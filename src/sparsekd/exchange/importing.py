"""Other projects' files into this one: scores of pairs into the bank, margins and bare triples into a table of their own.

Scores are banked under an identity that their owner states, all or none, float32. The bank holds scores of pairs, so a layout
that carries margins or nothing cannot enter it; such rows become a score table of kind margin or none, which the trainer takes
and no recipe's key leads to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sparsekd.artifact import find, key_of, publish, sha256_of_file
from sparsekd.bank.scores import ScoreBank
from sparsekd.bank.text_key import text_keys
from sparsekd.collection.beir import collection_digest, read_texts
from sparsekd.collection.reading import shown
from sparsekd.exchange.collecting import Texts, collect_pairs
from sparsekd.exchange.layouts import LAYOUTS, Layout
from sparsekd.exchange.readers import margins_refused, read_rows
from sparsekd.exchange.rows import Row, refused
from sparsekd.exchange.tabular import find_files
from sparsekd.labels.contract import KIND, TABLE_VERSION, Contract, Kind, table_schema
from sparsekd.labels.score_table import ScoreTable
from sparsekd.mining.shards import ROWS_PER_SHARD, write_shards
from sparsekd.provenance import provenance
from sparsekd.recipe.section import NAME
from sparsekd.teachers.identity import file_identity

IMPORT_STAGE = "exchange/table v1"


@dataclass(frozen=True)
class Statement:
    """What the owner says of the scores; all of it is their identity."""

    name: str
    fields: Mapping[str, str]

    @property
    def identity(self) -> dict[str, Any]:
        """The key of the score bank; never a model's. ValueError if the name is not one that a recipe can write."""
        if not re.fullmatch(NAME, self.name):
            raise ValueError(f"--name {shown(self.name)}: expected letters, digits, '.', '_' or '-', at most 64; choose another")
        return file_identity(self.name, self.fields)


@dataclass(frozen=True)
class Imported:
    """Where scores went and how many; ``pairs`` = ``added`` + ``known``, each pair once by content."""

    folder: Path
    pairs: int
    added: int
    known: int
    """Pairs that the bank held already, with the same score."""
    repeated: int
    unknown: int


def import_scores(
    layout: Layout, path: Path, statement: Statement, *, cache: Path, collection: Path | None = None, skip_unknown: bool = False
) -> Imported:
    """Bank the scores of a file under the stated identity, all or none (above 2^28 pairs segment by segment: run it again).

    Ids are resolved by ``collection`` (a BEIR folder), whose qrels play no part; texts that it lacks are refused like unknown ids.
    Raises ValueError, and nothing is banked, for a layout without scores, any row that is not whole, a pair with two scores, or
    one that the bank knows under this identity with another score.
    """
    identity = statement.identity
    _require_scores(layout, path)
    texts = None if collection is None else Texts(*read_texts(collection), skip_unknown)
    pairs = collect_pairs(layout, partial(read_rows, layout, path), texts)
    query_keys, passage_keys = text_keys(pairs.queries)[pairs.query_index], text_keys(pairs.passages)[pairs.passage_index]
    bank = ScoreBank(cache / "bank").open(identity, reference=statement.name)
    banked = bank.lookup(query_keys, passage_keys)
    is_known = ~np.isnan(banked)
    other = np.flatnonzero(is_known & (banked != pairs.gold_sim))
    if other.size:
        first = int(other[0])
        raise ValueError(
            f"{path}: {other.size:,} of {len(banked):,} pairs are banked as {statement.name!r} with another score (first: "
            f"{pairs.shown(first)}: {banked[first]} there, {pairs.gold_sim[first]} here); one identity gives one score: choose "
            "another --name or add a --field"
        )
    new = np.flatnonzero(~is_known)
    if new.size:
        bank.append(query_keys[new], passage_keys[new], pairs.gold_sim[new], describe=lambda row: pairs.shown(int(new[row])))
    return Imported(
        bank.folder,
        pairs=len(banked),
        added=int(new.size),
        known=int(is_known.sum()),
        repeated=pairs.num_repeated,
        unknown=pairs.num_unknown,
    )


def import_table(layout: Layout, path: Path, statement: Statement, *, cache: Path, collection: Path) -> ScoreTable:
    """Publish triples with margins, or bare ones, as a score table of two passages a row; a hit if it is there.

    Equal rows count once. Raises ValueError for a layout that carries scores, an unknown id, or a triple with two margins.
    """
    if layout.carries == "scores":
        raise ValueError(
            f"layout {layout.name} carries scores of pairs; import them into the bank (without --to table): a recipe with a "
            'teacher of kind = "file" makes tables of them'
        )
    kind: Kind = "margin" if layout.carries == "margins" else "none"
    files = find_files(path, layout.stem, layout.endings)
    fields = {
        "stage": IMPORT_STAGE,
        "version": TABLE_VERSION,
        "kind": kind,
        "identity": statement.identity,
        "files": [sha256_of_file(file) for file in files],
        "collection": collection_digest(collection, ("corpus.jsonl", "queries.jsonl")),
    }
    folder = cache / "tables" / key_of(fields)
    if find(folder, fields) is not None:
        return ScoreTable.open(folder)
    margins, num_repeated = _margin_by_triple(layout, path, collection)
    extra: dict[str, Any] = {
        **provenance(()),
        "recipe": {"collection": {"path": str(collection)}},
        "counts": {"rows": len(margins), "rows_dropped": {"repeated": num_repeated}},
        "summary": {},
    }
    teachers = ({"identity": key_of(statement.identity), "weight": 1.0},) if kind == "margin" else ()
    calibration = {"kind": "raw"} if kind == "margin" else None
    schema = table_schema(kind, Contract(num_passages=2, teachers=teachers, calibration=calibration))
    with publish(folder, kind=KIND, fields=fields, extra=extra) as temporary:
        triples = list(margins)
        parts = [triples[start : start + ROWS_PER_SHARD] for start in range(0, len(triples), ROWS_PER_SHARD)]
        tables = (_table(part, [margins[triple] for triple in part], schema) for part in parts)
        extra["shards"] = write_shards(temporary, KIND, tables, len(parts))
    return ScoreTable.open(folder)


def _require_scores(layout: Layout, path: Path) -> None:
    if layout.carries == "margins":
        raise margins_refused(str(path))
    if layout.carries == "nothing":
        with_scores = ", ".join(each.name for each in LAYOUTS.values() if each.carries == "scores")
        remedy = f"import bare triples as a table with --to table, or give one of: {with_scores}"
        raise refused(str(path), f"layout {layout.name}, which carries no score", "a score of each pair", remedy)


_Triple = tuple[str, str, str]


def _margin_by_triple(layout: Layout, path: Path, collection: Path) -> tuple[dict[_Triple, list[float]], int]:
    """Return [margin] (or []) by triple, in file order, and how many rows were met again."""
    queries, passages = read_texts(collection)
    margins: dict[_Triple, list[float]] = {}
    num_rows = 0
    for row in read_rows(layout, path):
        num_rows += 1
        _require_known(row, queries, passages)
        labels = [float(np.float32(score)) for score in row.scores]
        triple = (row.query, row.passages[0], row.passages[1])
        if margins.setdefault(triple, labels) != labels:
            found = f"margin {row.scores[0]} of {shown(' '.join(triple))}, which a row above gives {margins[triple][0]}"
            raise refused(row.place, found, "one margin per triple", "keep the right row")
    if not margins:
        raise ValueError(f"{path}: 0 rows, expected at least one triple; write the file again")
    return margins, num_rows - len(margins)


def _require_known(row: Row, queries: Mapping[str, str], passages: Mapping[str, str]) -> None:
    named = (("query_id", row.query, queries, "queries"), *(("passage_id", each, passages, "corpus") for each in row.passages))
    for name, text_id, known, file in named:
        if text_id not in known:
            expected = f"an _id of the collection's {file}.jsonl"
            raise refused(row.place, f"{name} {shown(text_id)}", expected, "they must agree character by character")


def _table(triples: list[_Triple], labels: list[list[float]], schema: Any) -> Any:
    passages = pa.array([passage_id for triple in triples for passage_id in triple[1:]], pa.string())
    columns = [pa.array([triple[0] for triple in triples], pa.string()), pa.FixedSizeListArray.from_arrays(passages, 2)]
    if "margin" in schema.names:
        flat = pa.array([value for values in labels for value in values], pa.float32())
        columns.append(pa.FixedSizeListArray.from_arrays(flat, 1))
    return pa.Table.from_arrays(columns, schema=schema)
