"""A student as one ONNX graph, from token ids and mask to its sparse vectors, by torch's own exporter, proven in ONNX Runtime.

Inputs ``input_ids`` and ``attention_mask``, int64 [batch, tokens], both axes free; output ``weights``, float32 [batch, V], 0 where
a dim is not active. Of a student with a transformer on one side only, that side: the other weighs its own tokens by a table.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsekd.exchange.target import exported, require_free
from sparsekd.model_reference import weights_identity
from sparsekd.provenance import provenance

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder

ONNX_STAGE = "engines/onnx v1"
MODEL = "model.onnx"
TOLERANCE = 1e-4
"""Largest difference of a weight that is let pass; a MiniLM student's was 1.3e-5."""

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Another batch and other lengths than those traced: a graph that holds for the traced ones only is found out.
_TRACED = ("a short text", "another text, which is somewhat longer than the first")
_PROBES = (("one",), ("heat flow over a thin wing " * 4, "a short text", "air"))


def export_onnx(student: Path, target: Path, *, overwrite: bool = False) -> float:
    """Write ``model.onnx`` and the tokenizer as ``target``, a new folder; return the largest difference on probes.

    ``student`` holds a saved SparseEncoder. Takes half a minute for 22M parameters. Raises ValueError if a package is missing, the
    target exists, the student cuts its vectors after the graph (``max_active_dims``), has no transformer, does not export, or its
    graph's weights differ by more than ``TOLERANCE``.
    """
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"export onnx: needs the package {name}, which is not installed; pip install 'sparsekd[onnx]'")
    require_free(target, overwrite)
    if not (student / "modules.json").is_file():
        raise ValueError(f"student {student}: holds no modules.json; expected the folder of a saved SparseEncoder")
    fields = {"stage": ONNX_STAGE, "student": weights_identity(student)}
    from sentence_transformers import SparseEncoder

    model = SparseEncoder(str(student), device="cpu", local_files_only=True).eval()
    if model.max_active_dims is not None and model.max_active_dims < getattr(model[-1], "k", model.max_active_dims + 1):
        raise ValueError(
            f"student {student}: keeps max_active_dims = {model.max_active_dims} after its modules, which no graph of them does; "
            "save it without"
        )
    task, modules = _modules(model, student)
    extra: dict[str, Any] = {**provenance(()), "task": task, "prompt": model.prompts.get(task or "document") or ""}
    with exported(target, fields=fields, extra=extra, overwrite=overwrite) as folder:
        _write_graph(model, modules, task, folder / MODEL)
        model.tokenizer.save_pretrained(folder)
        extra["max_length"] = modules[0].max_seq_length
        extra["largest_difference"] = difference = _largest_difference(model, task, folder / MODEL)
    return difference


def _modules(model: SparseEncoder, student: Path) -> tuple[str | None, list[Any]]:
    """Return the route that has a transformer, None without routes, and its modules."""
    from sentence_transformers.base.modules import Router, Transformer

    first: Any = model[0]
    if not isinstance(first, Router):
        routes: dict[str | None, list[Any]] = {None: list(model)}
    else:
        sub_modules: Any = first.sub_modules
        routes = {name: [*route, *list(model)[1:]] for name, route in sub_modules.items()}
    for task, modules in routes.items():
        if isinstance(modules[0], Transformer):
            return task, modules
    raise ValueError(f"student {student}: has no transformer, so there is no graph to write: its table is all of it")


def _write_graph(model: SparseEncoder, modules: list[Any], task: str | None, path: Path) -> None:
    import torch

    features = model.preprocess(list(_TRACED), task=task)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=modules[0].max_seq_length)}
    names = ("input_ids", "attention_mask")
    with torch.no_grad(), _known_warnings_ignored():
        program = torch.onnx.export(
            _graph(modules),
            tuple(features[name] for name in names),
            dynamo=True,
            dynamic_shapes={name: axes for name in names},
            input_names=list(names),
            output_names=["weights"],
            verbose=False,
        )
    assert program is not None
    program.save(str(path))


def _graph(modules: list[Any]) -> Any:
    """Return a torch module from ids and mask to vectors.

    SPLADE's pooling is written anew, as equation 6 of arXiv 2109.10086: the library's loops over tokens in Python, which fixes
    their number in the graph.
    """
    import torch
    from sentence_transformers.sparse_encoder.modules import SpladePooling
    from torch import Tensor, nn

    class Graph(nn.Module):
        """The student's modules, one after the other."""

        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(modules)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            features: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
            for part in self.parts:
                features = pooled(part, features) if isinstance(part, SpladePooling) else part(features)
            return torch.as_tensor(features["sentence_embedding"])

    def pooled(pooling: SpladePooling, features: dict[str, Any]) -> dict[str, Any]:
        weights_BTV = torch.log1p(torch.relu(features["token_embeddings"])) * features["attention_mask"].unsqueeze(-1)
        if pooling.activation_function == "log1p_relu":
            weights_BTV = torch.log1p(weights_BTV)
        vectors_BV = weights_BTV.amax(dim=1) if pooling.pooling_strategy == "max" else weights_BTV.sum(dim=1)
        return {**features, "sentence_embedding": vectors_BV}

    return Graph().eval()


def _largest_difference(model: SparseEncoder, task: str | None, path: Path) -> float:
    """Return the largest difference between the graph's weights and the student's; ValueError if it is above TOLERANCE."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    shapes = {each.name: each.shape for each in session.get_inputs()}
    if any(isinstance(axis, int) for shape in shapes.values() for axis in shape):
        raise ValueError(f"export onnx: the graph's axes are fixed ({shapes}), so it would take no other texts; nothing written")
    difference = 0.0
    for texts in _PROBES:
        features = model.preprocess(list(texts), task=task)
        found = session.run(None, {each.name: features[each.name].numpy() for each in session.get_inputs()})[0]
        with torch.no_grad():
            routed: dict[str, Any] = {} if task is None else {"task": task}
            expected = model(features, **routed)["sentence_embedding"].numpy()
        difference = max(difference, float(np.abs(found - expected).max()))
    if not difference <= TOLERANCE:
        raise ValueError(
            f"export onnx: the graph's weights differ from the student's by {difference:.2g} on probes, more than {TOLERANCE:g}; "
            "nothing written"
        )
    return difference


@contextlib.contextmanager
def _known_warnings_ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        # torch 2.13's exporter reads its own deprecated class, and says that two inputs share an axis, as they should.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", r"# The axis name: (batch|tokens) will not be used", UserWarning)
        yield
