"""A cross-encoder's classifier on OpenVINO's CPU plugin: texts of one length, no padding, the last layer for the pooled token only.

torch's own exporter gives the graph, OpenVINO takes it as it is: no ONNX. ``float32`` is float32 (OpenVINO's own default on a CPU
with bfloat16 units is not); ``bfloat16`` is refused where the CPU has none. int8: weights to 8 bits, one scale and zero point per
row of a matrix; activations to 8 bits per token and 128 dims as they come, so that no score depends on the batch it came in.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sparsekd.packed_body import evaluating
from sparsekd.recipe import Run, Teacher
from sparsekd.teachers.pair_tokens import PairTokens
from sparsekd.teachers.pooled_token import UNMASKED, attend_unmasked, position_offset, shorten_last_layer

_EXAMPLE = (3, 11)  # texts and tokens of the call that is traced; both are free in the graph
# Dims of a token's activations that share a scale. MiniLM, time of fp32 over time of int8: 32 1.26, 64 1.52, 128 1.65, 384 1.65;
# largest error at 384 twice that at 128.
_GROUP = "128"
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVINOClassifier:
    """Scores batches of tokenized pairs."""

    def __init__(self, transformer: Any, teacher: Teacher, run: Run, *, has_types: bool) -> None:
        """Export and compile a sentence-transformers Transformer's classifier, whose module is then of no other use.

        Raises ValueError where OpenVINO is missing, the device is no CPU, the CPU lacks the precision, or the architecture is one
        whose last layer cannot be computed for the pooled token only.
        """
        openvino = _openvino(teacher)
        self._has_types = has_types
        if run.device != "cpu":
            raise ValueError(f'teacher {teacher.name!r}: backend = "openvino" runs on the CPU, and [run] device = {run.device!r}')
        core = openvino.Core()
        precision = _PRECISIONS[teacher.dtype]
        found = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and "BF16" not in found:
            raise ValueError(
                f'teacher {teacher.name!r}: dtype = "bfloat16", but this CPU computes {", ".join(found)}; set dtype = "float32"'
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's exporter about its own pytrees
            program = _exported(transformer, teacher, has_types)
            graph = openvino.convert_model(program, share_weights=False)  # the module's weights go when it does
        if teacher.quantization == "int8":
            _quantize_weights(graph)
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # other work shares the cores
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": _GROUP if teacher.quantization == "int8" else "0",
        }
        self._compiled = core.compile_model(graph, "CPU", settings)

    def __call__(self, tokens: PairTokens, batch: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return float32 [n]: the logits of these pairs, sorted by length; one inference per length."""
        scores = []
        for length, run in itertools.groupby(batch, key=lambda position: tokens.lengths[position]):
            ids, types = tokens.flat(np.fromiter(run, dtype=np.int64))
            inputs = [part.reshape(-1, length) for part in (ids, types if self._has_types else None) if part is not None]
            scores.append(np.array(self._compiled(inputs)[0], dtype=np.float32).reshape(-1))
        return np.concatenate(scores)


class _Rectangular(nn.Module):
    """The classifier as a function of ids and token types [B, L], every token of which is one."""

    def __init__(self, model: nn.Module, offset: int) -> None:
        super().__init__()
        self.model, self.offset = model, offset

    def forward(self, ids: Tensor, types: Tensor | None = None) -> Tensor:
        positions = torch.arange(ids.shape[1]).unsqueeze(0) + self.offset
        features = {} if types is None else {"token_type_ids": types}
        logits: Tensor = self.model(input_ids=ids, position_ids=positions.expand(ids.shape), **features).logits
        return logits


def _exported(transformer: Any, teacher: Teacher, has_types: bool) -> Any:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(UNMASKED, attend_unmasked)
    AttentionMaskInterface.register(UNMASKED, lambda **_: None)
    model = transformer.model
    if not shorten_last_layer(model):
        raise ValueError(
            f"teacher {teacher.name!r}: {type(model).__name__} is not built like BERT or DistilBERT, which is what "
            'backend = "openvino" takes; set backend = "torch"'
        )
    model.config._attn_implementation = UNMASKED
    names = ["ids", "types"] if has_types else ["ids"]
    example = tuple(torch.ones(_EXAMPLE, dtype=torch.int64) for _ in names)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with evaluating(model), torch.no_grad():
        return torch.export.export(
            _Rectangular(model, position_offset(transformer)), example, dynamic_shapes=dict.fromkeys(names, free)
        )


def _quantize_weights(graph: Any) -> None:
    """Replace the matrix of every linear layer by uint8 with a scale and a zero point per row."""
    from openvino import opset13 as ops

    for node in graph.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        constant = node.input_value(1).get_node()
        if constant.get_type_name() != "Constant" or len(constant.get_output_shape(0)) != 2:
            continue
        weights = constant.data if node.get_attributes()["transpose_b"] else constant.data.T
        low = np.minimum(weights.min(axis=1, keepdims=True), 0)
        scale = ((np.maximum(weights.max(axis=1, keepdims=True), 0) - low) / 255).astype(np.float32)
        scale[scale == 0] = 1  # a row of zeros
        zero = np.round(-low / scale)
        quantized = np.clip(np.round(weights / scale) + zero, 0, 255).astype(np.uint8)
        centred = ops.subtract(ops.convert(ops.constant(quantized), "f32"), ops.convert(ops.constant(zero.astype(np.uint8)), "f32"))
        product = ops.matmul(
            node.input_value(0), ops.multiply(centred, ops.constant(scale)), node.get_attributes()["transpose_a"], True
        )
        node.output(0).replace(product.output(0))
    graph.validate_nodes_and_infer_types()


def _openvino(teacher: Teacher) -> Any:
    try:
        import openvino
    except ImportError as error:
        raise ValueError(
            f'teacher {teacher.name!r}: backend = "openvino" needs the package openvino ({error}); install the extra of that name, '
            '`make setup EXTRAS="cpu,openvino"`, or set backend = "torch"'
        ) from error
    return openvino
