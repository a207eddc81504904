"""The teachers a recipe can name, one class for each way that a gold_sim comes about, with every default."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from sparsekd.recipe.section import NAME, EncoderSpec, ModelSpec, Section

_QWEN3_RERANKER = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n<Instruct>: {instruction}\n<Query>: {query}\n'
    "<Document>: {passage}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)


class _Teacher(Section):
    name: str = Field(pattern=NAME)
    """How recipes, logs and metrics call it; enters no score key."""


class _GatedTeacher(_Teacher):
    gate: bool = True
    """Before it scores 20,000 pairs or more, have it rerank BM25's best passages of judged queries, and stop the run if it ranks
    worse than BM25: a broken teacher costs minutes, not hours. Changes no score."""


class Teacher(_GatedTeacher, EncoderSpec):
    """A model whose raw score of a (query, passage) pair is gold_sim."""

    kind: Literal["dense", "cross-encoder", "sparse", "late-interaction"]
    """``dense``: the bi-encoder's own similarity. ``cross-encoder``: the logit, no activation. ``sparse``: the dot product of a
    SparseEncoder's vectors. ``late-interaction``: MaxSim of a MultiVectorEncoder's token vectors; max_length bounds passages
    alone, queries keep the model's own width."""
    backend: Literal["torch", "openvino"] = "torch"
    """What computes a cross-encoder. ``openvino`` takes BERT's kind on a CPU, equal up to float rounding, and needs the extra of
    that name. Torch is the default because it takes every architecture and device."""
    quantization: Literal["int8"] | None = None
    """``int8``: a cross-encoder on openvino multiplies in 8 bits: faster, other scores (docs/numbers.md). None: in ``dtype``."""

    @model_validator(mode="after")
    def _backend_computes_it(self) -> Self:
        if self.backend != "torch" and self.kind != "cross-encoder":
            raise ValueError(f'backend = "{self.backend}" computes cross-encoders, and kind is "{self.kind}"; leave backend out')
        if self.backend == "openvino" and (self.dtype == "float16" or self.trust_remote_code):
            raise ValueError('backend = "openvino" takes dtype "float32" or "bfloat16", and no trust_remote_code')
        if self.quantization is not None and (self.backend != "openvino" or self.dtype != "float32"):
            raise ValueError('quantization = "int8" needs backend = "openvino" and dtype = "float32"')
        return self

    @property
    def reference(self) -> str:
        """What people call it; decides nothing."""
        return self.model


class _TokenLogitTeacher(_GatedTeacher, ModelSpec):
    """A language model that is asked about a pair and answers with the logit of one token, less that of another."""

    template: str
    true_token: str
    false_token: str
    max_length: int

    @property
    def reference(self) -> str:
        """What people call it; decides nothing."""
        return self.model

    @property
    def filled_template(self) -> str:
        """The template with everything in it but query and passage."""
        return self.template

    @model_validator(mode="after")
    def _template_has_a_place_for_both(self) -> Self:
        places = re.findall(r"\{(query|passage)\}", self.filled_template)
        if sorted(places) != ["passage", "query"]:
            raise ValueError(
                f"[[teachers]] {self.name!r}: template has the places {places}; expected {{query}} and {{passage}}, once each"
            )
        return self


class CausalLMTeacher(_TokenLogitTeacher):
    """A decoder asked whether a passage answers a query: logit of ``yes`` less logit of ``no`` after the prompt."""

    kind: Literal["causal-lm"]
    instruction: str = "Given a web search query, retrieve relevant passages that answer the query"
    """What ``{instruction}`` stands for: the task in a sentence. This one is that of Qwen3-Reranker's card."""
    template: str = Field(default=_QWEN3_RERANKER, min_length=1)
    """The whole prompt, special tokens written out, since the tokenizer adds none; ``{query}`` and ``{passage}`` once each,
    ``{instruction}`` where wanted. That of Qwen3-Reranker's model card; each family was trained on its own."""
    true_token: str = Field(default="yes", min_length=1)
    """Token of the vocabulary whose logit says relevant."""
    false_token: str = "no"
    """Token whose logit is taken off; empty takes none off (bge-reranker-v2-gemma has ``Yes`` alone)."""
    max_length: int = Field(default=8192, ge=2)
    """Tokens of the whole prompt, as the model card has it; over it a passage loses its end, and is counted."""

    @property
    def filled_template(self) -> str:
        """The template with everything in it but query and passage."""
        return self.template.replace("{instruction}", self.instruction)

    @model_validator(mode="after")
    def _instruction_acts(self) -> Self:
        if "{instruction}" not in self.template and self.instruction != type(self).model_fields["instruction"].default:
            raise ValueError(
                f"[[teachers]] {self.name!r}: instruction = {self.instruction!r} has no {{instruction}} in the template to "
                "stand for; put one there or remove the key"
            )
        return self


class Seq2SeqLMTeacher(_TokenLogitTeacher):
    """An encoder-decoder asked the same, by its first decoded token: monoT5 (arXiv 2003.06713), RankT5 (arXiv 2210.10634)."""

    kind: Literal["seq2seq-lm"]
    template: str = Field(default="Query: {query} Document: {passage} Relevant:</s>", min_length=1)
    """The whole input, special tokens written out, since the tokenizer adds none; ``{query}`` and ``{passage}`` once each. That of
    monoT5; RankT5 has no ``Relevant:``."""
    true_token: str = Field(default="▁true", min_length=1)
    """Token of the vocabulary whose logit says relevant; RankT5's is ``<extra_id_10>``."""
    false_token: str = "▁false"
    """Token whose logit is taken off; empty takes none off, as RankT5 does. The softmax over both that monoT5 reports is the
    sigmoid of this difference."""
    max_length: int = Field(default=512, ge=2)
    """Tokens of the whole input, as monoT5 was trained; over it a passage loses its end, and is counted."""


class CallableTeacher(_GatedTeacher):
    """A Python function of yours: what it returns for a pair is gold_sim."""

    kind: Literal["callable"]
    function: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """``module:function``, from the working directory or installed: takes a list of (query, passage) texts and returns a finite
    float for each, in order."""
    identity: dict[str, str] = Field(min_length=1)
    """Everything that can change a score (version, weights, prompt, ...), as you state it: with the function's name the key its
    scores are banked under. Nothing looks inside the function, so a change that is not stated here is not seen."""

    @property
    def reference(self) -> str:
        """What people call it; decides nothing."""
        return " ".join([self.function, *(f"{name}={value}" for name, value in sorted(self.identity.items()))])


class BM25Teacher(_Teacher):
    """BM25 over the collection's passages (Lucene variant, Porter stemmer), the miner's own, whose score of a pair is gold_sim."""

    kind: Literal["bm25"]
    k1: float = Field(default=0.9, gt=0)
    """Term-frequency saturation; 0.9 is Anserini's default."""
    b: float = Field(default=0.4, ge=0, le=1)
    """Length normalisation; 0.4 is Anserini's default."""

    @property
    def reference(self) -> str:
        """What people call it; decides nothing."""
        return f"k1={self.k1:g} b={self.b:g}"


class FileTeacher(_Teacher):
    """Scores that somebody else computed and ``sparsekd import`` has put into the bank; asks no model and scores no new pair."""

    kind: Literal["file"]
    imported: str = Field(pattern=NAME)
    """The ``--name`` the scores were imported under; a pair that they lack is an error, or by ``[labels] missing`` left to
    the other teachers: never 0, never a mean."""
    fields: dict[str, str] = Field(default={})
    """Every ``--field`` they were imported under; together with the name, their identity. None by default."""

    @property
    def reference(self) -> str:
        """What people call it; decides nothing."""
        return " ".join([self.imported, *(f"{name}={value}" for name, value in sorted(self.fields.items()))])


TokenLogitTeacher = CausalLMTeacher | Seq2SeqLMTeacher
AnyTeacher = Teacher | CausalLMTeacher | Seq2SeqLMTeacher | CallableTeacher | BM25Teacher | FileTeacher
