"""The cards of a hub folder: Markdown under the YAML that a hub and ``datasets`` read. Licences are the owner's to state."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparsekd.labels.contract import ORDERS, table_schema
from sparsekd.labels.score_table import ScoreTable
from sparsekd.report.text import paths_in, without_paths, without_paths_in
from sparsekd.training.rows import LABEL_COLUMN

ROWS = "rows.parquet"
TABLE = "table.parquet"
_UNSTATED = "# license: not stated; see Licence below"
_CITED = "\n## Cited\n"
_LICENCE = """
## Licence

Not stated: whoever publishes this decides, and puts `license: ...` where the first lines say so. {bound_by}
"""
_TAUGHT_BY = (
    "It was made from the weights it started from, the teachers' scores and the collection's texts; each has terms of its own."
)
_HOLDS = "Texts belong to the authors of the collection, and the terms of the teachers may reach their scores."
_NOT_SAID = ("name", "kind", "gate")  # said otherwise, or changes no score
_MEANINGS = {
    "score_list": "one gold_sim per passage, the teacher's view of it, positive first",
    "margin": "gold_sim(positive) − gold_sim(negative), one per negative",
    "none": "no label: the passages alone, positive first",
    "similarity": "the pair's gold_sim moved to 0..1",
    "embedding": "the sparse teacher's vector of the text",
}
_LOSSES = {
    "score_list": "SparseDistillKLDivLoss, SparseMarginMSELoss",
    "margin": "SparseMarginMSELoss",
    "none": "SparseMultipleNegativesRankingLoss",
    "similarity": "SparseCoSENTLoss, SparseAnglELoss, SparseCosineSimilarityLoss",
    "embedding": "SparseMSELoss, which stands alone",
}


def student_card(card: str, known: Iterable[str]) -> str:
    """Return a student's card without paths of the machine, those ``known`` among them, and with a section on its licence."""
    front, told, cited = card.partition(_CITED)
    front = without_paths(front, known).replace("---\n", f"---\n{_UNSTATED}\n", 1)
    return front + _LICENCE.format(bound_by=_TAUGHT_BY) + told + cited


def scores_card(table: ScoreTable, columns: list[str]) -> str:
    """Return the card of a score table as a dataset; ``columns`` are those of its rows of texts, empty where it has none."""
    manifest = without_paths_in(table.artifact.manifest, paths_in(table.artifact.manifest))
    recipe, collection = manifest.get("recipe", {}), _collection_name(table)
    has_texts = bool(columns)
    return f"""---
{_UNSTATED}
tags:
- sparsekd
- distillation
- sentence-transformers
configs:
{_configs(has_texts)}
---

# Teacher scores of {collection}

{len(table):,} rows that taught a learned sparse retriever, distilled with sparsekd. Labels of kind `{table.kind}`:
{_MEANINGS[table.kind]}.

## Columns

{_columns(table, columns)}

{_use(table, has_texts)}

## Teachers

{_teachers(recipe, manifest)}

{_calibration(table)}

## Counts

Rows, rows dropped by reason, pairs scored; under `mining` what was proposed and what each filter dropped:

```json
{_json(table.counts)}
```

Figures of the labels:

```json
{_json(table.summary)}
```

## Made by

```
{manifest.get("command", "not recorded")}
```

Score table `{table.key}`. Versions: `{json.dumps(manifest.get("versions", {}), sort_keys=True)}`.
{_LICENCE.format(bound_by=_HOLDS if has_texts else "The terms of the teachers may reach their scores.")}"""


def _configs(has_texts: bool) -> str:
    configs = [("rows", ROWS)] if has_texts else []
    return "\n".join(
        f"- config_name: {name}\n  data_files: {file}" + ("\n  default: true" if number == 0 else "")
        for number, (name, file) in enumerate([*configs, ("table", TABLE)])
    )


def _columns(table: ScoreTable, columns: list[str]) -> str:
    ids = table_schema(table.kind, table.contract).names
    described = [f"- `table` ({TABLE}): `{', '.join(ids)}`, ids of the collection; order: {ORDERS[table.kind]}."]
    if columns:
        label_is = f"; `{LABEL_COLUMN}`: {_MEANINGS[table.kind]}" if LABEL_COLUMN in columns else ""
        described.insert(0, f"- `rows` ({ROWS}), the default: `{', '.join(columns)}`{label_is}.")
    else:
        described.append("- No texts: they are left out, since they are not to be published; the ids say which they are.")
    return "\n".join(described)


def _use(table: ScoreTable, has_texts: bool) -> str:
    if not has_texts:
        return """```python
from datasets import load_dataset

table = load_dataset("PATH_OF_THIS_FOLDER", split="train")  # join its ids with your copy of the collection
```"""
    return f"""```python
from datasets import load_dataset

rows = load_dataset("PATH_OF_THIS_FOLDER", split="train")  # SparseEncoderTrainer takes it as it is
table = load_dataset("PATH_OF_THIS_FOLDER", "table", split="train")
```

Losses that learn from it: {_LOSSES[table.kind]}."""


def _teachers(recipe: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """A line per teacher of the recipe, with what its scores weigh; imported tables have no recipe."""
    weights = manifest.get("teachers", {})
    lines = []
    for teacher in recipe.get("teachers", []):
        name, weight = teacher["name"], weights.get(teacher["name"])
        said = {key: value for key, value in teacher.items() if key not in _NOT_SAID and value not in (None, "", False)}
        labels = "labels nothing" if weight is None else f"weight {weight:g}"
        lines.append(f"- `{name}`: {teacher['kind']}, {labels}; `{json.dumps(said, sort_keys=True, ensure_ascii=False)}`")
    return "\n".join(lines) or f"Imported: `{json.dumps(manifest['fields'].get('identity', {}), sort_keys=True)}`"


def _calibration(table: ScoreTable) -> str:
    said = {"calibration": table.contract.calibration, "rescale": table.contract.rescale, "range": table.contract.label_range}
    acting = {name: value for name, value in said.items() if value is not None}
    identities = ", ".join(f"`{teacher['identity']}`" for teacher in table.teachers) or "none"
    by_teacher = {teacher["identity"]: teacher["calibration"] for teacher in table.teachers if "calibration" in teacher}
    parts = [f"Identities of the teachers that label: {identities}."]
    parts += [f"Calibration and what followed it: `{json.dumps(acting, sort_keys=True)}`."] if acting else []
    parts += [f"Calibration by teacher: `{json.dumps(by_teacher, sort_keys=True)}`."] if by_teacher else []
    return "\n".join(parts)


def _collection_name(table: ScoreTable) -> str:
    return Path(str(table.artifact.manifest.get("recipe", {}).get("collection", {}).get("path", "a collection"))).name


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True)
