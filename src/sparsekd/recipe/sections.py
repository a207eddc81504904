"""The sections of a recipe as frozen pydantic models: with `mining.py` and `teachers.py`, the only home of defaults."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from sparsekd.recipe import ensembles, rules
from sparsekd.recipe.mining import Mining
from sparsekd.recipe.section import Section as _Section
from sparsekd.recipe.study import Study
from sparsekd.recipe.teacher_training import TrainTeacher
from sparsekd.recipe.teachers import AnyTeacher


class Collection(_Section):
    """Passages, queries and qrels in BEIR layout, and which part of them an experiment uses."""

    path: str = Field(min_length=1)
    """BEIR folder, absolute or relative to the working directory; its path enters no key, its bytes do."""
    max_passages: int | None = Field(default=None, ge=1)
    """Keep this many passages, those of smallest sha256(passage_id), and the queries that still have a judged passage.
    Makes retrieval easier, so figures compare only at equal values. None keeps all."""
    max_train_queries: int | None = Field(default=None, ge=1)
    """Train on this many queries, those of smallest sha256(query_id). None trains on all."""
    publish_texts: bool = True
    """Whether reports and hub folders may hold texts of its queries and passages; false where its licence forbids to publish them.
    Changes no artifact and enters no key. True: a page is for looking at texts, and what leaves the machine is yours to decide."""


class Calibration(_Section):
    """A view over raw scores; changing it calls no teacher."""

    kind: Literal["raw", "zscore", "minmax", "affine", "rank", "percentile"] = "raw"
    """``raw`` as scored; ``zscore`` (x − mean) / std over all of the teacher's scores in the table; ``minmax`` per query to
    0..scale; ``affine`` to the reference mean and std; ``rank`` per query, the share of the other passages that it is above;
    ``percentile`` the share of all positives that it is not below."""
    scale: float = Field(default=1.0, gt=0)
    """Multiplies zscore, minmax, rank and percentile; OpenSearch's recipe is minmax with 30."""
    mean: float = 0.0
    """Reference mean for affine."""
    std: float = Field(default=1.0, gt=0)
    """Reference standard deviation for affine."""
    reference: str | None = None
    """Teacher whose raw scores in the table give affine its mean and std; it may weigh 0. None takes the numbers stated."""


class Labels(_Section):
    """How banked scores become the rows a student trains on."""

    kind: Literal["score_list", "margin", "none", "similarity", "embedding"] = "score_list"
    """``score_list``: N gold_sim, positive first. ``margin``: N−1 gold_sim(positive) − gold_sim(negative). ``none``: passages only,
    for contrastive losses. ``similarity``: one (query, passage) pair a row with its combined gold_sim moved to [0, 1].
    ``embedding``: one text a row with the sparse teacher's vector of it."""
    layout: Literal["list", "triplets"] = "list"
    """``list``: one row per query with all its negatives. ``triplets``: one row per (query, positive, negative)."""
    num_negatives: int = Field(default=4, ge=0)
    """Negatives per row; a query with fewer kept candidates is dropped and counted, never padded. 0 is for ``none``: pairs."""
    selection: Literal["top", "random", "stratified"] = "top"
    """``top`` interleaves the miners by rank; ``random`` draws seeded per query id; ``stratified`` draws one negative from each of
    num_negatives equal bands of the candidates' gold_sim (arXiv 2604.04734)."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the draws."""
    selection_teacher: str | None = None
    """Teacher whose raw gold_sim ``stratified`` covers and ``promote_above`` compares. None takes the recipe's only teacher."""
    promote_above: float | None = None
    """Candidates with at least this raw gold_sim become positives, a row each, and no negatives: judgements are incomplete. The
    scale is the teacher's, so there is no default; they are counted and listed, and set no filter's ceiling."""
    calibration: Calibration = Calibration()
    """Applied to each teacher before they are combined."""
    calibrations: dict[str, Calibration] = Field(default={})
    """Calibration per teacher name, instead of ``calibration``, for those that are named."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(default={})
    """Weight per teacher name, every teacher named; empty means every teacher equally."""
    combine: Literal["mean", "sum"] = "mean"
    """``mean`` divides the weighted sum of the teachers' calibrated scores by the sum of the weights; ``sum`` takes it as it is."""
    missing: Literal["require", "renormalize"] = "require"
    """A pair that a teacher of the mix has not scored: ``require`` refuses it; ``renormalize`` shares that teacher's weight out
    among those that have, in proportion to theirs; so imported scores may lack pairs, but not those of a teacher that filters or
    selects. A pair that none has scored is refused always."""
    allow_quarantine: int = Field(default=0, ge=0)
    """Pairs, over all teachers, that the table may do without because they ended every process that scored them. They are left out
    of their query's row, counted, and enter the key; more of them end stage 1 with exit 3, as texts that no encoder survives do."""
    rescale: Calibration = Calibration()
    """Applied to the combined scores, over the whole table: raw, zscore or affine; SPLADE-v3's recipe is affine to a reference."""


class Budget(_Section):
    """How many active dims a trained student may have; lambda is driven there by feedback."""

    query_active_dims: float | None = Field(default=None, gt=0)
    """Mean active dims of queries; None leaves lambda_query as it is."""
    passage_active_dims: float | None = Field(default=None, gt=0)
    """Mean active dims of passages; None leaves lambda_passage as it is."""


class Student(_Section):
    """The sparse encoder that is trained."""

    kind: Literal["splade", "csr"] = "splade"
    """``splade``: weights over the vocabulary from a masked-LM head. ``csr``: a sparse autoencoder over a dense encoder."""
    model: str = Field(min_length=1)
    """Starting weights: for ``splade`` a masked-LM checkpoint or an encoder without a head; for ``csr`` a dense encoder."""
    num_layers: int | None = Field(default=None, ge=1)
    """Keep the first L transformer layers only; None keeps all."""
    max_length: int = Field(default=128, ge=4)
    """Tokens per query and per passage, special tokens included, in training and in the saved model."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Dropout of hidden states and attention while training; None keeps the checkpoint's own."""
    initial_active_dims: int | None = Field(default=None, ge=1)
    """Lower the output bias so that a sample of passages starts with this many active dims on average; needs an encoder without a
    head. None leaves the bias at zero, where nearly the whole vocabulary is active."""
    residual_scale: float = Field(default=1.0, gt=0, le=1)
    """Multiply what each layer's attention and feed-forward add to a token by this before training; needs an encoder without a
    head. Below 1 a token's last state says more of its own word: untrained, .5 to .7 ranks best (docs/numbers.md). 1 keeps them."""
    head_warmup_steps: int = Field(default=0, ge=0)
    """Masked-LM steps on the collection's own passages, head only, before anything else; for a head that starts as the identity."""
    expansion: Literal["both", "passage", "query"] = "both"
    """Which side passes through the transformer. ``passage``: inference-free, a query weighs its own terms by a table.
    ``query``: the other way round."""
    static_weights: Literal["idf", "ones"] = "idf"
    """What the table starts from where one side has no transformer: the collection's IDF, or 1 per term."""
    static_frozen: bool = False
    """Leave the table as it starts."""
    hidden_dim: int | None = Field(default=None, ge=2)
    """csr: width of the sparse vectors; None takes 4 times the encoder's."""
    k: int = Field(default=64, ge=1)
    """csr: active dims of every vector."""
    k_aux: int = Field(default=512, ge=0)
    """csr: dead dims revived per step by the auxiliary loss."""
    freeze_body: bool = False
    """csr: train the autoencoder only."""
    lora_rank: int | None = Field(default=None, ge=1)
    """Train low-rank adapters of the transformer's attention instead of its weights; merged into the weights when saved."""
    lora_alpha: float = Field(default=16.0, gt=0)
    """Scale of the adapters: alpha / rank multiplies them."""
    query_prompt: str = ""
    """Text put before each query, in training and in encode_query."""
    passage_prompt: str = ""
    """Text put before each passage, in training and in encode_document."""
    regularizer: str = Field(default="FLOPS", min_length=1)
    """Of both sides. ``FLOPS``: Paria et al. 2020. ``L1``: mean absolute weight sum. ``DF-FLOPS``: arXiv 2505.15070. ``IDF-FLOPS``:
    arXiv 2411.04403. ``module:Class``: a torch module with compute_loss_from_embeddings."""
    lambda_query: float = Field(default=0.1, ge=0)
    """Final weight of the queries' regularizer; with a budget, where feedback starts."""
    lambda_passage: float = Field(default=0.08, ge=0)
    """Final weight of the passages' regularizer; with a budget, where feedback starts."""
    threshold_query: int | None = Field(default=None, ge=1)
    """Queries with at most this many active dims are left out of the regularizer."""
    threshold_passage: int | None = Field(default=None, ge=1)
    """Passages with at most this many active dims are left out of the regularizer."""
    budget: Budget | None = None
    """Drive lambda by feedback until active dims meet this; None keeps lambda as given."""


class Training(_Section):
    """How the student learns the score table."""

    loss: str | dict[str, Annotated[float, Field(gt=0)]] = "SparseDistillKLDivLoss"
    """Main loss, or a weighted sum: ``{SparseDistillKLDivLoss = 1.0, SparseMarginMSELoss = 0.05}``. ``module:Class`` names one
    of your own."""
    wrapper: Literal["SpladeLoss", "CachedSpladeLoss", "CSRLoss", "none"] | None = None
    """What adds the regularizers. None takes the student's: CSRLoss for csr, ``none`` for SparseMSELoss, CachedSpladeLoss where
    mini_batch_size is set, SpladeLoss else."""
    mini_batch_size: int | None = Field(default=None, ge=1)
    """Texts embedded at once by CachedSpladeLoss: memory of this many, loss and gradients of all, one forward pass more."""
    temperature: float = Field(default=2.0, gt=0)
    """Softmax temperature of both sides in KL; 2.0 is the library's sparse default (1.0 gave zero active dims)."""
    label_scale: Literal["student"] | Annotated[float, Field(gt=0)] = 1.0
    """Multiplies score lists and margins. ``student``: by what leaves the untrained student's margins their size, measured before
    step 0 (``training/label_scale.py``), so that a recipe fits any teacher and any student. 1 takes labels as they are banked."""
    scale: float = Field(default=1.0, gt=0)
    """Multiplies the similarities of SparseMultipleNegativesRankingLoss, SparseCoSENTLoss and SparseAnglELoss."""
    triplet_margin: float = Field(default=5.0, gt=0)
    """Margin of SparseTripletLoss."""
    csr_beta: float = Field(default=0.1, ge=0)
    """CSRLoss: weight of the auxiliary reconstruction."""
    csr_gamma: float = Field(default=1.0, ge=0)
    """CSRLoss: weight of the main loss."""
    batch_size: int = Field(default=16, ge=1)
    """Rows per optimizer step, over all processes. Regularizers see all of them, so lambda means the same on any number."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the forward pass under autocast; master weights are float32 always."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the table; ignored when max_steps is set."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; None derives them from epochs."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak learning rate of AdamW, reached after warmup, then linear to zero."""
    static_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the table of a side without a transformer. Its weights are of the size of an IDF, some 5, and hardly
    move at a transformer's rate. None takes learning_rate."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps spent warming up."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient clipping by global norm."""
    lambda_schedule: Literal["quadratic", "linear"] = "quadratic"
    """Growth of both regularizer weights from 0."""
    lambda_warmup_ratio: float = Field(default=1 / 3, gt=0, le=1)
    """Share of the steps after which the regularizer weights stand at their final value, or the budget's feedback at its target."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of data order and dropout."""
    dev_steps: int | None = Field(default=None, ge=1)
    """Measure dev nDCG@10 every this many steps and keep the best student, of those within the budget if there is one. None
    keeps the last and measures nothing."""
    dev_queries: int = Field(default=100, ge=1)
    """Dev queries measured, those of smallest sha256(query_id)."""
    dev_depth: int = Field(default=50, ge=1)
    """BM25 passages per dev query, beside the judged ones, that are ranked."""
    min_active_dims: float = Field(default=1.0, ge=0)
    """Collapse alarm: fewer active dims than this on either side, for collapse_patience steps, stop the run."""
    max_active_share: float = Field(default=0.5, gt=0, le=1)
    """Collapse alarm: after lambda's warm-up, more of the vocabulary than this active on either side, for collapse_patience steps,
    stop the run."""
    collapse_patience: int = Field(default=50, ge=1)
    """Steps outside the healthy band before the run stops."""

    @property
    def losses(self) -> dict[str, float]:
        """Weight by name of each main loss."""
        return {self.loss: 1.0} if isinstance(self.loss, str) else dict(self.loss)


class Evaluation(_Section):
    """What is measured, and against what."""

    split: Literal["dev", "test"] = "test"
    """Which qrels."""
    students: bool = True
    """Measure the students, training them first if need be; off, to see what BM25 and the teachers are worth before any is."""
    rerank_depth: int = Field(default=100, ge=1)
    """BM25 passages that a teacher of pairs reranks: any but dense, sparse and bm25."""
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
    search_device: Literal["cpu"] | None = None
    """Where FAISS searches: ``cpu`` where ``device`` is a GPU that FAISS cannot use, be it faiss-cpu that is installed or an index
    without a GPU form; None searches on ``device``."""
    threads: int | None = Field(default=None, ge=1, le=4096)
    """Compute threads; None leaves torch's own choice."""
    batch_tokens: int = Field(default=8192, ge=16)
    """Tokens per forward pass when encoding and scoring."""
    shard_pairs: int = Field(default=20_000, ge=1)
    """Pairs (or texts) scored between two commits to the bank: the most a crash can lose."""
    shard: str = Field(default="0/1", pattern=r"^\d+/[1-9]\d*$")
    """``i/N``, what ``--shard`` sets: which of N processes this is that run one recipe over one cache. It decides with which shards
    a process begins; all of them go on until everything is banked, so one alone finishes too."""
    workers: int = Field(default=1, ge=1, le=1024)
    """Processes that share stage 1, each with a copy of the teacher. ``threads`` are then each one's, by default its share of the
    cores (1 on a Ray cluster); ``device = "cuda"`` gives each a GPU in turn."""
    runner: Literal["local", "ray"] = "local"
    """Where workers run: on this machine, or on a Ray cluster whose nodes see ``cache`` and the collection at the same paths."""
    address: str | None = None
    """The Ray cluster's, e.g. ``auto`` on one of its nodes or ``10.0.0.1:6379``; None starts a cluster on this machine."""
    gpus_per_worker: float = Field(default=0.0, ge=0)
    """GPUs that Ray reserves for each worker; a fraction lets several share one."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Memory that the processes of a stage may use together, 10^9 bytes; a stage that is estimated to need more is refused before
    it begins. None takes what the machine, or its control group, has."""
    shard_passages: int = Field(default=20_000, ge=1)
    """Passages whose vectors a miner searches at once, so that no collection is larger than memory: 4 bytes a dim, 31 MB at
    width 384; twice as many under cosine where vectors are not of unit length."""
    fused_head: bool = True
    """Compute the SPLADE head block by block; off runs sentence-transformers' own module."""
    packed: bool = True
    """Run transformers on texts without padding where their attention allows it; off pads."""
    save_steps: int = Field(default=100, ge=1)
    """Optimizer steps between checkpoints: the most a crash can lose."""
    tensorboard: bool = False
    """Write the training log for TensorBoard beside the checkpoints; needs the package ``tensorboard``."""
    log_level: Literal["DEBUG", "INFO", "WARNING"] = "INFO"
    """Verbosity on stderr."""

    @field_validator("shard")
    @classmethod
    def _is_one_of_them(cls, shard: str) -> str:
        index, of = map(int, shard.split("/"))
        if index >= of:
            raise ValueError(f"{shard!r}: expected i/N with i from 0 to N - 1")
        return shard

    @model_validator(mode="after")
    def _cluster_is_asked_for(self) -> Self:
        for key in ("address", "gpus_per_worker"):
            if self.runner != "ray" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"[run] {key} acts on runner = 'ray' only; remove the key, or set run.runner = 'ray'")
        return self

    @property
    def is_shared(self) -> bool:
        """Whether stage 1 is left to workers."""
        return self.workers > 1 or self.runner == "ray"

    @property
    def part(self) -> tuple[int, int]:
        """``shard`` as numbers: i, N."""
        index, of = map(int, self.shard.split("/"))
        return index, of


class Recipe(_Section):
    """One experiment: what is wanted, whole."""

    collection: Collection
    mining: Mining
    train_teacher: TrainTeacher | None = None
    """A cross-encoder to fine-tune before everything else (``make train-teacher``); None trains none."""
    teachers: tuple[Annotated[AnyTeacher, Field(discriminator="kind")], ...] = Field(min_length=1, strict=False)
    labels: Labels = Labels()
    student: Student
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    run: Run = Run()
    study: Study | None = None
    """Experiments to run and compare over one bank (``make study``); the other stages take the recipe as it stands."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        rules.check_names(self)
        ensembles.check_calibrations(self)
        rules.check_candidates_fill_rows(self)
        rules.check_rounds(self)
        rules.check_pairings(self)
        rules.check_train_teacher(self)
        return self
