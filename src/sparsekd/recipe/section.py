"""What every section of a recipe is, and the parts that several share: a model, and one that reads texts under prompts."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""What names in recipes are made of."""


class Section(BaseModel):
    """A table of a recipe: no key but those named here, no value of another type, nothing changed once it is read."""

    # allow_inf_nan: TOML has both, and nothing here means anything with either.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class ModelSpec(Section):
    """A model by reference, and how it is loaded."""

    model: str = Field(min_length=1)
    """Hub id with optional ``@revision``, local folder, or ``package:NAME`` (a model inside an installed package)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the model's weights and arithmetic; scores are stored as float32 whatever it is."""
    trust_remote_code: bool = False
    """Run Python code shipped inside the model folder."""


class EncoderSpec(ModelSpec):
    """A model that reads texts under prompts: what decides its vectors."""

    max_length: int | None = Field(default=None, ge=2)
    """Tokens per text, special tokens included; None takes the model's own limit."""
    query_prompt: str = ""
    """Text put before each query."""
    passage_prompt: str = ""
    """Text put before each passage."""
