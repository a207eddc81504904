"""``sparsekd search`` and ``sparsekd encode``: a student at work, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sparsekd.cli.columns import columns
from sparsekd.cli.errors import one_line_errors

if TYPE_CHECKING:
    from sparsekd.retrieval.answers import Answer

Student = Annotated[Path, typer.Argument(help="Folder of a saved SparseEncoder: CACHE/students/KEY.")]
Indexes = Annotated[Path, typer.Option("--indexes", help="Folder of the indexes, each made once.")]
DEFAULT_INDEXES = Path("data/cache/indexes")
_SHOWN_TERMS = 8
_SHOWN_CHARACTERS = 160


def search(
    student: Student,
    collection: Annotated[Path, typer.Argument(help="BEIR folder: its corpus.jsonl is searched.")],
    query: Annotated[str, typer.Argument(help="What is searched for.")],
    top: Annotated[int, typer.Option("--top", min=1, help="Passages shown.")] = 10,
    explain: Annotated[
        str | None, typer.Option("--explain", metavar="ID", help="Every term of this passage's score instead, found or not.")
    ] = None,
    indexes: Indexes = DEFAULT_INDEXES,
) -> None:
    """Show the best passages, exactly, with the terms that made their scores; the index is made at the first search."""
    with one_line_errors():
        from sparsekd.recipe import Run
        from sparsekd.report.text import visible
        from sparsekd.retrieval import StudentEncoder, find_or_build
        from sparsekd.retrieval.answers import answer_of, best_answers, position_of

        if not query.strip():
            raise ValueError("the query is empty; give what is to be searched for, in quotes")
        encoder = StudentEncoder(student, Run())
        index = find_or_build(encoder, collection, indexes)
        position = None if explain is None else position_of(index, explain)
        query_csr = encoder.encode([query], role="query")
        if position is not None:
            typer.echo(_explained(answer_of(index, query_csr, collection, position)))
            return
        answers = best_answers(index, query_csr, collection, top)
        if not answers:
            raise ValueError(f"no passage shares one of the query's {query_csr.nnz} active dims; try other words")
        for rank, answer in enumerate(answers, start=1):
            text = " ".join(visible(answer.text, _SHOWN_CHARACTERS).split())
            typer.echo(f"{rank}. {visible(answer.passage_id)}  {answer.score:.3f}  {text}")
            more = len(answer.terms) - _SHOWN_TERMS
            shown = ", ".join(
                f"{visible(term.name)} {term.query_weight:.2f} × {term.passage_weight:.2f}" for term in answer.terms[:_SHOWN_TERMS]
            )
            typer.echo(f"   {shown}{f' and {more} more' if more > 0 else ''}")


def _explained(answer: Answer) -> str:
    from sparsekd.report.text import visible

    head = f"{visible(answer.passage_id)}  {answer.score:.3f}\n{visible(answer.text, 1000)}\n"
    if not answer.terms:
        return f"{head}\nshares no active dim with the query"
    weights = [(term.name, term.query_weight, term.passage_weight, term.product) for term in answer.terms]
    rows = [(visible(name), *(f"{figure:.3f}" for figure in figures)) for name, *figures in weights]
    return f"{head}\n" + columns([("term", "query", "passage", "product"), *rows])


def encode(
    student: Student,
    texts: Annotated[Path, typer.Argument(help="A corpus.jsonl or queries.jsonl in BEIR layout.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    role: Annotated[Literal["passage", "query"], typer.Option("--role", help="Which side the texts are.")] = "passage",
    form: Annotated[Literal["jsonl", "csr"], typer.Option("--form", help="A line per text, or one scipy matrix.")] = "jsonl",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write the sparse vectors of a file's texts; the last line is the folder made."""
    with one_line_errors():
        from sparsekd.engines.encoding import encode_file
        from sparsekd.recipe import Run
        from sparsekd.retrieval import StudentEncoder

        if not texts.is_file():
            raise FileNotFoundError(f"{texts}: no such file; give a corpus.jsonl or queries.jsonl")
        number, active = encode_file(StudentEncoder(student, Run()), texts, out, role=role, form=form, overwrite=overwrite)
        typer.echo(f"{number:,} texts, {active:.1f} active dims on average", err=True)
        typer.echo(str(out))
