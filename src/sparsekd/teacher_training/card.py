"""The model card of a fine-tuned cross-encoder: what it is, on what it was trained, how well it reranks, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekd.artifact import write_file_atomically
from sparsekd.recipe import Recipe, TrainTeacher

if TYPE_CHECKING:
    from sparsekd.teacher_training.fit import TrainedTeacher


def write_card(path: Path, recipe: Recipe, section: TrainTeacher, trained: TrainedTeacher, extra: dict[str, Any]) -> None:
    """Write the card as Markdown to ``path``."""
    write_file_atomically(path, _card(recipe, section, trained, extra).encode("utf-8"))


def _card(recipe: Recipe, section: TrainTeacher, trained: TrainedTeacher, extra: dict[str, Any]) -> str:
    body = Path(section.model).name if Path(section.model).is_dir() else section.model  # a card travels, paths do not
    miners = ", ".join(miner.kind for miner in recipe.mining.asked)
    return f"""---
library_name: sentence-transformers
pipeline_tag: text-ranking
tags:
- sentence-transformers
- cross-encoder
- reranker
---

# Cross-encoder {section.name}, fine-tuned with sparsekd

Scores a (query, passage) pair by one logit, without activation; at most {section.max_length} tokens a pair.

```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("PATH_OF_THIS_FOLDER")
print(model.predict([("which passage answers this?", "this one")]))
```

## Quality

nDCG@10 on at most {section.dev_queries} dev queries, reranking BM25's best {section.dev_depth} passages:
{trained.dev["reranked"]:.4f}, where BM25's own order has {trained.dev["bm25"]:.4f}.
The figure chose the checkpoint, so measure on another split before you quote it.

## Data

Collection `{Path(recipe.collection.path).name}`, train split. A row is a query, a judged positive and
{section.num_negatives} of its mined candidates (miners: {miners}). Counts: `{json.dumps(trained.counts, sort_keys=True)}`

## Training

{section.loss} `{json.dumps(trained.loss_config, sort_keys=True)}`, {trained.num_steps} steps of {section.batch_size} rows, learning
rate {section.learning_rate:g}, precision {section.precision}, seed {section.seed}. Weights of step {trained.best_step}, the best of
those measured every {section.dev_steps} steps. Started from `{body}`.

## Made by

```
{extra["command"]}
```

Versions: `{json.dumps(extra["versions"], sort_keys=True)}`. Key, recipe and checksums of every file are in `manifest.json`.

## Cited

```bibtex
{trained.citation}
```
"""
