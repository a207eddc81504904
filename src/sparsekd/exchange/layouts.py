"""The layouts of other projects: name, what a row refers to, what it carries, which tables can be written in it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from sparsekd.labels.contract import Kind

Labels = Literal["scores", "margins", "nothing"]


@dataclass(frozen=True)
class Layout:
    """One layout."""

    name: str
    refers_to: Literal["ids", "texts"]
    """Whether rows name queries and passages by a collection's ids or carry the texts themselves."""
    carries: Labels
    """``scores``: one per (query, passage) pair; ``margins``: gold_sim(positive) − gold_sim(negative) alone."""
    stem: str
    """Name, without ending, of the file with the rows."""
    endings: tuple[str, ...]
    """Endings that are read, the one that is written first."""
    kinds: tuple[Kind, ...]
    """Kinds of score table that can be written in it."""

    @property
    def file_name(self) -> str:
        """Name of the file that an export writes the rows to."""
        return self.stem + self.endings[0]


_TABULAR = (".arrow", ".parquet", ".jsonl")
_PAIRS: tuple[Kind, ...] = ("score_list", "similarity")
_RANKED: tuple[Kind, ...] = ("score_list", "none")
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("n-tuples", "texts", "scores", "train", _TABULAR, ("score_list",)),
        Layout("margins", "ids", "margins", "train", _TABULAR, ("score_list", "margin")),
        Layout("score-dict", "ids", "scores", "scores", (".pkl.gz", ".pkl"), _PAIRS),
        Layout("flagembedding", "texts", "scores", "train", (".jsonl", ".json"), _RANKED),
        Layout("tevatron", "texts", "scores", "train", (".jsonl", ".json"), _RANKED),
        Layout("pylate", "texts", "scores", "train", _TABULAR, ("score_list",)),
        Layout("trec-run", "ids", "scores", "run", (".trec", ".run", ".txt"), _PAIRS),
        Layout("colbert", "ids", "scores", "nway", (".jsonl", ".json"), ("score_list",)),
        Layout("msmarco-triples", "ids", "nothing", "triples", (".tsv",), ("score_list", "margin", "none")),
    )
}


def layout_of(name: str) -> Layout:
    """Return the layout of that name; ValueError, with the nearest one, if there is none."""
    if name not in LAYOUTS:
        near = difflib.get_close_matches(name, LAYOUTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of: {', '.join(LAYOUTS)}"
        raise ValueError(f"layout {name!r} is not known; {hint}")
    return LAYOUTS[name]
