"""The recipe: one TOML file becomes frozen pydantic models, the only home of defaults.

Everything outside ``[run]`` may change bytes and enters the keys of what it changes; ``[run]`` is recorded and enters none.
Unknown keys are refused with the nearest known one. Imports no torch; loading costs milliseconds.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sparsekd.overrides import apply_override

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class _Section(BaseModel):
    # allow_inf_nan: TOML has both, and nothing here means anything with either.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class Collection(_Section):
    """Passages, queries and qrels in BEIR layout, and which part of them an experiment uses."""

    path: str = Field(min_length=1)
    """BEIR folder, absolute or relative to the working directory; its path enters no key, its bytes do."""
    max_passages: int | None = Field(default=None, ge=1)
    """Keep this many passages, those of smallest sha256(passage_id), and the queries that still have a judged passage.
    Makes retrieval easier, so figures compare only at equal values. None keeps all."""
    max_train_queries: int | None = Field(default=None, ge=1)
    """Train on this many queries, those of smallest sha256(query_id). None trains on all."""


class EncoderSpec(_Section):
    """A dense bi-encoder: what decides its vectors."""

    model: str = Field(min_length=1)
    """Hub id with optional ``@revision``, local folder, or ``package:NAME`` (a model inside an installed package)."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens per text, special tokens included; None takes the model's own limit."""
    query_prompt: str = ""
    """Text put before each query."""
    passage_prompt: str = ""
    """Text put before each passage."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model's weights and arithmetic; scores are stored as float32 whatever it is."""
    trust_remote_code: bool = False
    """Run Python code shipped inside the model folder."""


class BM25Miner(_Section):
    """Proposes passages by BM25 (Lucene variant, Porter stemmer)."""

    kind: Literal["bm25"]
    quota: int = Field(ge=1)
    """Candidates this miner contributes per query, after positives and duplicates are taken out."""
    depth: int = Field(default=100, ge=1)
    """Passages retrieved per query, from which the quota is filled in rank order."""
    skip: int = Field(default=0, ge=0)
    """Leading ranks left out: the likeliest unjudged positives."""
    k1: float = Field(default=0.9, gt=0)
    """Term-frequency saturation; 0.9 is Anserini's default."""
    b: float = Field(default=0.4, ge=0, le=1)
    """Length normalisation; 0.4 is Anserini's default."""


class DenseMiner(EncoderSpec):
    """Proposes passages by exact search (FAISS flat index) over a bi-encoder's vectors, in its own similarity."""

    kind: Literal["dense"]
    quota: int = Field(ge=1)
    """Candidates this miner contributes per query, after positives and duplicates are taken out."""
    depth: int = Field(default=100, ge=1)
    """Passages retrieved per query, from which the quota is filled in rank order."""
    skip: int = Field(default=0, ge=0)
    """Leading ranks left out: the likeliest unjudged positives."""


class NegativeFilter(_Section):
    """Takes out likely false negatives by comparing each candidate with the query's weakest positive."""

    by: str = "miner"
    """Whose scores decide: ``miner`` (the one that proposed the candidate) or a teacher's name."""
    absolute_margin: float | None = Field(default=None, ge=0)
    """Drop a candidate scoring above positive − margin."""
    relative_margin: float | None = Field(default=None, ge=0)
    """Drop a candidate scoring above positive − margin × |positive|; the absolute value keeps it right for logits below 0."""


class Mining(_Section):
    """Which passages become candidates for each training query."""

    miners: tuple[Annotated[BM25Miner | DenseMiner, Field(discriminator="kind")], ...] = Field(min_length=1, strict=False)
    """Asked in order; a passage proposed twice counts for the first."""
    filter: NegativeFilter = NegativeFilter()
    """Positive-aware filter; without margins it drops nothing."""
    max_positives: int | None = Field(default=None, ge=1)
    """Positives scored per query, highest grade first, then smallest sha256(passage_id). None takes all."""


class Teacher(EncoderSpec):
    """A model whose raw score of a (query, passage) pair is gold_sim."""

    name: str = Field(pattern=NAME)
    """How recipes, logs and metrics call it; enters no score key."""
    kind: Literal["dense", "cross-encoder"]
    """``dense``: the bi-encoder's own similarity. ``cross-encoder``: the logit, no activation."""


class Calibration(_Section):
    """A view over raw scores; changing it calls no teacher."""

    kind: Literal["raw", "zscore", "minmax", "affine"] = "raw"
    """``raw`` as scored; ``zscore`` (x − mean) / std over all of the teacher's scores in the table; ``minmax`` per query to
    0..scale; ``affine`` to the reference mean and std."""
    scale: float = Field(default=1.0, gt=0)
    """Multiplies zscore and minmax; OpenSearch's recipe is minmax with 30."""
    mean: float = 0.0
    """Reference mean for affine."""
    std: float = Field(default=1.0, gt=0)
    """Reference standard deviation for affine."""


class Labels(_Section):
    """How banked scores become the rows a student trains on."""

    kind: Literal["score_list", "margin"] = "score_list"
    """``score_list``: N gold_sim, positive first. ``margin``: N−1 gold_sim(positive) − gold_sim(negative)."""
    num_negatives: int = Field(default=4, ge=1)
    """Negatives per row; a query with fewer kept candidates is dropped and counted, never padded."""
    selection: Literal["top", "random"] = "top"
    """``top`` interleaves the miners by rank; ``random`` draws seeded per query id."""
    seed: int = 0
    """Seed of random selection."""
    calibration: Calibration = Calibration()
    """Applied to each teacher before they are combined."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Weight per teacher name in the weighted mean, every teacher named; empty means every teacher equally."""


class Student(_Section):
    """The sparse encoder that is trained."""

    model: str = Field(min_length=1)
    """Starting weights: a masked-LM checkpoint, or an encoder without a head."""
    num_layers: int | None = Field(default=None, ge=1)
    """Keep the first L transformer layers only; None keeps all."""
    max_length: int = Field(default=128, ge=4)
    """Tokens per query and per passage, special tokens included, in training and in the saved model."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout of hidden states and attention while training; None keeps the checkpoint's own."""
    initial_active_dims: int | None = Field(default=None, ge=1)
    """Lower the output bias so that a sample of passages starts with this many active dims on average; needs an encoder without a
    head. None leaves the bias at zero, where nearly the whole vocabulary is active."""
    query_prompt: str = ""
    """Text put before each query, in training and in encode_query."""
    passage_prompt: str = ""
    """Text put before each passage, in training and in encode_document."""
    lambda_query: float = Field(default=0.1, ge=0)
    """Final weight of the FLOPS regularizer on queries (Paria et al. 2020)."""
    lambda_passage: float = Field(default=0.08, ge=0)
    """Final weight of the FLOPS regularizer on passages."""
    threshold_query: int | None = Field(default=None, ge=1)
    """Queries with at most this many active dims are left out of the regularizer."""
    threshold_passage: int | None = Field(default=None, ge=1)
    """Passages with at most this many active dims are left out of the regularizer."""


class Training(_Section):
    """How the student learns the score table."""

    loss: Literal["SparseDistillKLDivLoss", "SparseMarginMSELoss"] = "SparseDistillKLDivLoss"
    """Inner loss; SpladeLoss adds the regularizers. KL needs ``score_list`` labels."""
    temperature: float = Field(default=2.0, gt=0)
    """Softmax temperature of both sides in KL; 2.0 is the library's sparse default (1.0 gave zero active dims)."""
    batch_size: int = Field(default=16, ge=1)
    """Rows per optimizer step. The FLOPS statistic is taken over it, so it changes sparsity at equal lambda."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the table; ignored when max_steps is set."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; None derives them from epochs."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak learning rate of AdamW, reached after warmup, then linear to zero."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps spent warming up."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient clipping by global norm."""
    lambda_schedule: Literal["quadratic", "linear"] = "quadratic"
    """Growth of both regularizer weights from 0."""
    lambda_warmup_ratio: float = Field(default=1 / 3, gt=0, le=1)
    """Share of the steps after which the regularizer weights stand at their final value."""
    seed: int = 42
    """Seed of data order and dropout."""


class Evaluation(_Section):
    """What is measured, and against what."""

    split: Literal["dev", "test"] = "test"
    """Which qrels."""
    rerank_depth: int = Field(default=100, ge=1)
    """BM25 passages that a cross-encoder reranks."""
    k1: float = Field(default=0.9, gt=0)
    """BM25 baseline."""
    b: float = Field(default=0.4, ge=0, le=1)
    """BM25 baseline."""


class Run(_Section):
    """Where and how fast; changes no bytes beyond float rounding and enters no key."""

    cache: str = Field(default="data/cache", min_length=1)
    """Folder of the bank and of everything made."""
    device: str = Field(default="cpu", pattern=r"^(cpu|mps|cuda(:\d+)?)$")
    """torch device; ``cuda`` is used only when asked for, and refused where there is none."""
    threads: int | None = Field(default=None, ge=1)
    """Compute threads; None leaves torch's own choice."""
    batch_tokens: int = Field(default=8192, ge=16)
    """Tokens per forward pass when encoding and scoring."""
    shard_pairs: int = Field(default=20_000, ge=1)
    """Pairs (or texts) scored between two commits to the bank: the most a crash can lose."""
    fused_head: bool = True
    """Train with the SPLADE head computed block by block; off runs sentence-transformers' own modules."""
    save_steps: int = Field(default=100, ge=1)
    """Optimizer steps between checkpoints: the most a crash can lose."""
    log_level: Literal["DEBUG", "INFO", "WARNING"] = "INFO"
    """Verbosity on stderr."""


class Recipe(_Section):
    """One experiment: what is wanted, whole."""

    collection: Collection
    mining: Mining
    teachers: tuple[Teacher, ...] = Field(min_length=1, strict=False)
    labels: Labels = Labels()
    student: Student
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    run: Run = Run()

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        names = [teacher.name for teacher in self.teachers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"[[teachers]] name {twice[0]!r} is used twice; each teacher needs its own")
        for name in self.labels.weights:
            if name not in names:
                raise ValueError(f"[labels] weights names {name!r}, which is no teacher; expected one of {names}")
        left_out = [name for name in names if name not in self.labels.weights]
        if self.labels.weights and left_out:
            raise ValueError(f"[labels] weights leaves out {left_out[0]!r}; name every teacher (0 ignores one) or none")
        if self.labels.weights and not any(weight > 0 for weight in self.labels.weights.values()):
            raise ValueError("[labels] weights has no positive weight; give at least one teacher a weight above 0")
        if self.mining.filter.by not in ("miner", *names):
            raise ValueError(f"[mining.filter] by = {self.mining.filter.by!r}: expected 'miner' or one of the teachers {names}")
        return self

    @model_validator(mode="after")
    def _candidates_can_fill_rows(self) -> Self:
        for position, miner in enumerate(self.mining.miners):
            if miner.depth < miner.skip + miner.quota:
                raise ValueError(
                    f"[mining.miners.{position}] depth = {miner.depth} is less than skip + quota = {miner.skip + miner.quota}: "
                    "the quota can never be filled; raise depth"
                )
        proposed = sum(miner.quota for miner in self.mining.miners)
        if self.labels.num_negatives > proposed:
            raise ValueError(
                f"[labels] num_negatives = {self.labels.num_negatives}, but the quotas of the miners add up to {proposed}: "
                "every row would be dropped; raise a quota or lower num_negatives"
            )
        return self

    @model_validator(mode="after")
    def _loss_fits_labels(self) -> Self:
        if self.training.loss == "SparseDistillKLDivLoss" and self.labels.kind == "margin":
            raise ValueError(
                '[training] loss = "SparseDistillKLDivLoss" needs [labels] kind = "score_list": '
                'a softmax over margins leaves the positive out; or choose loss = "SparseMarginMSELoss"'
            )
        return self


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and validate a recipe, with ``section.key=value`` overrides applied before validation.

    Raises FileNotFoundError if the file is missing and ValueError, naming file, section, key, what was found and what was
    expected, for anything that is not a recipe.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe; expected a TOML file, e.g. pipeline/recipes/quickstart.toml")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, a number of 5,000 digits, 1,000 nested brackets
        raise ValueError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        apply_override(document, override)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        problems = [problem for problem in error.errors() if not _is_echo(problem)]
        raise ValueError("\n".join(f"{path}: {_explain(problem)}" for problem in problems)) from error


def _is_echo(problem: Mapping[str, Any]) -> bool:
    """Say whether pydantic only repeats, as a list too short, that it refused one of the list's items."""
    return problem["type"] == "too_short" and bool(problem["input"])


def _explain(problem: Mapping[str, Any]) -> str:
    """One line: section, key, what was found, what was expected."""
    kind, context, message = problem["type"], problem.get("ctx", {}), str(problem["msg"])
    if kind == "value_error":
        return message.removeprefix("Value error, ")  # ours: names its section itself
    if kind.startswith("union_tag"):
        return _explain_tag(problem)
    place = _place(problem["loc"])
    section, key = ".".join(place[:-1]) or "top level", place[-1] if place else ""
    if kind == "extra_forbidden":
        return f"[{section}] {key} is not a known key; {_hint(key, _known_keys(problem['loc']))}"
    if kind == "missing":
        return f"[{section}] {key} is missing; it has no default"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        expected = "expected a table"
    elif kind == "tuple_type":
        expected = f"expected a list of tables, e.g. [[{'.'.join(place)}]]"
    elif kind == "too_short":
        expected = f"expected at least {context['min_length']} item"
    else:
        expected = f"{message[:1].lower()}{message[1:]}"
    return f"[{section}] {key} = {problem['input']!r}: {expected}"


def _explain_tag(problem: Mapping[str, Any]) -> str:
    """Explain a miner whose ``kind`` is missing or unknown."""
    section, found = ".".join(_place(problem["loc"])), problem["input"].get("kind")
    if problem["type"] == "union_tag_not_found":
        return f"[{section}] kind is missing; expected one of: {', '.join(_KINDS)}"
    return f"[{section}] kind = {found!r} is not a known miner; {_hint(str(found), list(_KINDS))}"


def _hint(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"expected one of: {', '.join(known)}"


_KINDS: dict[str, type[BaseModel]] = {"bm25": BM25Miner, "dense": DenseMiner}
_MODELS: dict[str, type[BaseModel]] = {
    "collection": Collection,
    "mining": Mining,
    "filter": NegativeFilter,
    "teachers": Teacher,
    "labels": Labels,
    "calibration": Calibration,
    "student": Student,
    "training": Training,
    "evaluation": Evaluation,
    "run": Run,
}


def _place(location: Sequence[str | int]) -> list[str]:
    """Return the location without the tag (its kind) that pydantic puts after a miner's position: no place in the file."""
    parts = [str(part) for part in location]
    return parts[:3] + parts[4:] if parts[:2] == ["mining", "miners"] else parts


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """Keys of the model that refused the unknown key at the end of ``location``."""
    model: type[BaseModel] = Recipe
    for part in location[:-1]:
        model = (_MODELS | _KINDS).get(str(part), model)
    return list(model.model_fields)
