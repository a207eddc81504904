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


def write_card(path: Path, recipe: Recipe, table: ScoreTable, extra: dict[str, Any], trained: TrainedStudent) -> None:
    """Write the card as Markdown to ``path``."""
    write_file_atomically(path, _card(recipe, table, extra, trained).encode("utf-8"))


def _card(recipe: Recipe, table: ScoreTable, extra: dict[str, Any], trained: TrainedStudent) -> str:
    training, student = recipe.training, recipe.student
    last: dict[str, Any] = next((entry for entry in reversed(trained.log_history) if "loss" in entry), {})
    teachers = "\n".join(f"- `{teacher.name}`: {teacher.kind}, `{_shown(teacher.model)}`" for teacher in recipe.teachers)
    return f"""{_FRONT_MATTER}
# SPLADE student distilled with sparsekd

A learned sparse retriever: `SparseEncoder` vectors over a vocabulary of {trained.model.get_embedding_dimension()} terms, dot
product, at most {student.max_length} tokens a text.

```python
from sentence_transformers import SparseEncoder

model = SparseEncoder("PATH_OF_THIS_FOLDER")
queries = model.encode_query(["which passages answer this?"])
passages = model.encode_document(["this one"])
print(model.similarity(queries, passages))
```

## Teachers

{teachers}

Calibration `{recipe.labels.calibration.kind}`, labels `{table.kind}`, {table.num_passages} passages a row, positive first.

## Data

Collection `{Path(recipe.collection.path).name}`, {extra["counts"]["rows"]} rows (score table `{table.key}`).
Counts of stage 1: `{json.dumps(table.counts, sort_keys=True)}`

## Training

Loss `SpladeLoss({training.loss})`, temperature {training.temperature:g}, lambda_query {student.lambda_query:g}, lambda_passage
{student.lambda_passage:g} ({training.lambda_schedule} ramp over {training.lambda_warmup_ratio:.0%} of the steps),
{trained.num_steps} steps of {training.batch_size} rows, learning rate {training.learning_rate:g}, seed {training.seed}.
Started from `{_shown(student.model)}`{f", first {student.num_layers} layers" if student.num_layers else ""}.
In the last logged batches: loss {last.get("loss", float("nan")):.4g}, query active dims {last.get("query_active_dims", 0):.0f},
passage active dims {last.get("passage_active_dims", 0):.0f}.

## Made by

```
{extra["command"]}
```

Versions: `{json.dumps(extra["versions"], sort_keys=True)}`. Keys, recipe and checksums of every file are in `manifest.json`.
"""


def _shown(reference: str) -> str:
    """A local folder is shown by its name: a card travels, a machine's paths do not."""
    return Path(reference).name if Path(reference).is_dir() else reference
