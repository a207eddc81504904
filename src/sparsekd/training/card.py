"""The model card of a student: what it is, what taught it, on what, and the command that makes it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekd.artifact import write_file_atomically
from sparsekd.labels.score_table import ScoreTable
from sparsekd.recipe import Recipe

if TYPE_CHECKING:
    from sparsekd.training.fit import TrainedStudent

_FRONT_MATTER = """---
library_name: sentence-transformers
pipeline_tag: feature-extraction
tags:
- sentence-transformers
- sparse-encoder
- sparse
- splade
- distillation
---
"""

_KINDS = {"splade": "SPLADE", "csr": "CSR"}
_EXPANSIONS = {
    "both": "queries and passages both through the transformer",
    "passage": "passages through the transformer, queries by a table of term weights",
    "query": "queries through the transformer, passages by a table of term weights",
}


def write_card(path: Path, recipe: Recipe, table: ScoreTable, extra: dict[str, Any], trained: TrainedStudent) -> None:
    """Write the card as Markdown to ``path``."""
    write_file_atomically(path, _card(recipe, table, extra, trained).encode("utf-8"))


def _card(recipe: Recipe, table: ScoreTable, extra: dict[str, Any], trained: TrainedStudent) -> str:
    training, student, card = recipe.training, recipe.student, trained.loss_card
    last: dict[str, Any] = next((entry for entry in reversed(trained.log_history) if "loss" in entry), {})
    teachers = "\n".join(f"- `{teacher.name}`: {teacher.kind}, `{_shown(teacher.reference)}`" for teacher in recipe.teachers)
    losses = "\n".join(f"- {loss['weight']:g} × {loss['name']} `{_json(loss['config'])}`" for loss in card["losses"])
    regularizers = "\n".join(
        f"- {side}: {regularizer['name']} `{_json(regularizer['config'])}`, lambda {last.get(f'lambda_{side}', 0.0):.4g} at the end"
        for side, regularizer in card["regularizers"].items()
    )
    citations = "\n\n".join(card["citations"])
    return f"""{_FRONT_MATTER}
# {_KINDS[student.kind]} student distilled with sparsekd

A learned sparse retriever: `SparseEncoder` vectors over {trained.model.get_embedding_dimension()} dims,
{_EXPANSIONS[student.expansion]}, similarity {trained.model.similarity_fn_name}, at most {student.max_length} tokens a text.

```python
from sentence_transformers import SparseEncoder

model = SparseEncoder("PATH_OF_THIS_FOLDER")
queries = model.encode_query(["which passages answer this?"])
passages = model.encode_document(["this one"])
print(model.similarity(queries, passages))
```

## Teachers

{teachers}

{_labels(recipe, table, card["label_scale"])}

## Data

Collection `{Path(recipe.collection.path).name}`, {extra["counts"]["rows"]} rows (score table `{table.key}`).
Counts of stage 1: `{_json(table.counts)}`
Counts of training: `{_json(extra["counts"])}`

## Training

Losses, in {card["wrapper"]}:

{losses}

Regularizers, over all rows of a step:

{regularizers or "- none"}

{trained.num_steps} steps of {training.batch_size} rows, learning rate {training.learning_rate:g},
precision {training.precision}, seed {training.seed}.
Started from `{_shown(student.model)}`{f", first {student.num_layers} layers" if student.num_layers else ""}.
In the last logged batch: loss {last.get("loss", float("nan")):.4g}, query active dims {last.get("query_active_dims", 0):.0f},
passage active dims {last.get("passage_active_dims", 0):.0f}.

## Made by

```
{extra["command"]}
```

Versions: `{_json(extra["versions"])}`. Keys, recipe and checksums of every file are in `manifest.json`.

## Cited

```bibtex
{citations}
```
"""


def _labels(recipe: Recipe, table: ScoreTable, label_scale: float) -> str:
    if table.kind == "none":
        return f"No labels: {table.num_passages} passages a row, positive first."
    if table.kind == "embedding":
        return "Labels: the teacher's vectors."
    calibration = f"Calibration {_calibration(recipe)}, labels `{table.kind}`"
    if table.kind == "similarity":
        return f"{calibration}, one pair a row."
    scaled = f", times {label_scale:g} in training" if label_scale != 1 else ""
    return f"{calibration}{scaled}, {table.num_passages} passages a row, positive first."


def _calibration(recipe: Recipe) -> str:
    """Kind for all teachers, then those of teachers that have their own, and what became of the combined scores."""
    labels = recipe.labels
    own = [f"`{calibration.kind}` for {name}" for name, calibration in labels.calibrations.items()]
    rescale = [] if labels.rescale.kind == "raw" else [f"combined scores by `{labels.rescale.kind}`"]
    return ", ".join([f"`{labels.calibration.kind}`", *own, *rescale])


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _shown(reference: str) -> str:
    """A local folder is shown by its name: a card travels, a machine's paths do not."""
    return Path(reference).name if Path(reference).is_dir() else reference
