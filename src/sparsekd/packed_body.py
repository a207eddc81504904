"""Transformers on texts without padding: all texts of a batch as one row of tokens, attention per text.

Linear layers, norms and embeddings work on tokens one by one, so they see no padding; position ids restart with each text.
Attention is one function registered with transformers' attention interface: on a CPU one SDPA call per run of texts of equal
length, on CUDA variable-length attention in half precision, else padded SDPA in attention alone. The features are
sentence-transformers' own flattened ones (input_ids and position_ids [1, T], cu_seq_lens_q int32 [B+1], ...), which its poolings
and GradCache read. Equal to the padded model up to float rounding; dropout draws other numbers. BERT, DistilBERT, RoBERTa,
XLM-RoBERTa, CamemBERT, ELECTRA and ModernBERT use it, and any other encoder that attends through the interface and passes the
check; MPNet, DeBERTa and their like compute attention themselves and stay padded.

Shapes: T tokens of all texts, B texts, L tokens of the longest, H heads, D width of a head.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import itertools
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

ATTENTION = "sparsekd_packed"
"""Name under which the attention function is registered."""

_PROBE = ("a short text", "x", "a third text that is longer than the first and ends here", "b c d")
# One SDPA call costs about as much as putting 24 tokens of queries, keys and values in order of length: 12 heads of 32, one core,
# 256 queries of 4 to 23 tokens 35 -> 23 ms forward when ordered, 64 passages of 20 to 128 tokens 37 -> 49 ms.
_TOKENS_PER_CALL = 24
_NOT_ATTENTION = "its attention does not go through transformers' attention interface"


def packable(model: PreTrainedModel) -> str | None:
    """Return None if ``model`` can run without padding, else why not. Reads its structure; ``packed`` checks its numbers too."""
    config = model.config
    if not getattr(model, "_supports_attention_backend", False):  # what is_backend_compatible() returns
        return f"{type(model).__name__}: {_NOT_ATTENTION}"
    is_causal = any(getattr(module, "is_causal", False) for module in model.modules())
    if is_causal or getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        return f"{type(model).__name__}: a decoder; only bidirectional encoders run without padding"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{type(model).__name__}: takes no position_ids, so positions would not restart with each text"
    if any(getattr(module, "config", config) is not config for module in model.modules()):
        return f"{type(model).__name__}: made of models with configurations of their own"
    return None


@contextlib.contextmanager
def packed(model: nn.Module) -> Iterator[dict[str, str]]:
    """Let every sentence-transformers Transformer inside ``model`` run without padding while the context lasts.

    Yields the reason by module name for those that stay padded; what their ``preprocess`` makes stays padded too, and padded
    features are taken by all of them. Each is compared with its padded self on four short texts first, to 1e-4 of the largest
    output (0.1 in half precision). State and saved files stay as they are. One whose padding its owner has fixed
    (``unpad_inputs = False``) is left so.
    """
    from sentence_transformers.base.modules import Transformer

    register()
    reasons: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if not isinstance(module, Transformer) or module.can_flatten_inputs:
                continue
            reason = _why_padded(module)
            if reason is None:
                plain = _probe(module)
                with contextlib.ExitStack() as own:
                    own.enter_context(_patched(module))
                    reason = _difference(plain, _probe(module), type(module.model).__name__)
                    if reason is None:
                        stack.enter_context(own.pop_all())
            if reason is not None:
                reasons[name] = reason
                logger.info("with padding: %s", reason)
        yield reasons


def flat_features(token_ids: Sequence[Sequence[int]], transformer: Any) -> dict[str, Any]:
    """Return the features of texts given as token ids, special ones included, in sentence-transformers' flattened form, on the CPU.

    What ``transformer.preprocess`` makes of the same texts inside ``packed``, without the tokenizer. Raises ValueError if a text
    has no tokens.
    """
    lengths = torch.tensor([len(ids) for ids in token_ids], dtype=torch.int64)
    if not bool((lengths > 0).all()):
        raise ValueError("flat_features: a text without tokens; expected special tokens at least")
    starts = lengths.cumsum(0) - lengths
    positions = torch.arange(int(lengths.sum())) - torch.repeat_interleave(starts, lengths)
    ids = torch.tensor(list(itertools.chain.from_iterable(token_ids)), dtype=torch.int64)
    return _flat(ids, positions + transformer._infer_flatten_position_offset(), lengths) | {"modality": "text"}


def select_texts(features: dict[str, Any], texts: Sequence[int]) -> dict[str, Any]:
    """Return the flattened features of these texts of a packed batch, in this order; ``modality`` and the like are kept."""
    lengths = features["cu_seq_lens_q"].diff().long()
    pieces = {key: features[key][0].split(lengths.tolist()) for key in ("input_ids", "position_ids")}
    ids, positions = (torch.cat([pieces[key][text] for text in texts]) for key in ("input_ids", "position_ids"))
    return features | _flat(ids, positions, lengths[list(texts)])


def _flat(ids_T: Tensor, positions_T: Tensor, lengths: Tensor) -> dict[str, Any]:
    cu_seq_lens = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max()) if len(lengths) else 0
    return {
        "input_ids": ids_T.unsqueeze(0),
        "position_ids": positions_T.unsqueeze(0),
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each text of a packed row; the signature and the result [1, T, H, D] are the attention interface's.

    ``query`` [1, H, T, D], ``key`` and ``value`` the same with as many heads or a divisor of them. ``sliding_window`` as in flash
    attention: a token sees those less than that many away. Without ``cu_seq_lens_q`` the features are padded: SDPA with their mask.
    """
    is_one_text = query.shape[0] == 1 and attention_mask is None
    if cu_seq_lens_q is None and not (is_one_text and sliding_window is not None):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        kwargs.pop("is_causal", None)
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=False, **kwargs
        )
        return output, None
    num_tokens = query.shape[2]
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q, max_length_q = torch.tensor([0, num_tokens], dtype=torch.int32, device=query.device), num_tokens
    texts = _texts(cu_seq_lens_q, max_length_q, num_tokens)
    window = None if sliding_window is None or sliding_window >= max_length_q else sliding_window - 1
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    if query.device.type == "cpu":
        output = _attend_by_length(query, key, value, texts, window, dropout, scaling)
    elif query.is_cuda and dropout == 0 and _has_varlen(query):
        output = _attend_varlen(query, key, value, texts, window, scaling)
    else:
        output = _attend_padded(query, key, value, texts, window, dropout, scaling)
    return output.unsqueeze(0), None


class _Texts:
    """Where texts lie in a packed row, each thing asked for once; nothing here waits for a device but ``lengths``."""

    def __init__(self, cu_seq_lens: Tensor, longest: int, num_tokens: int) -> None:
        self.cu_seq_lens = cu_seq_lens
        self.longest = longest
        self.num_tokens = num_tokens
        self.inference = torch.is_inference_mode_enabled()

    @cached_property
    def lengths(self) -> list[int]:
        return self.cu_seq_lens.diff().tolist()

    @cached_property
    def by_length(self) -> tuple[list[int], Tensor, Tensor] | None:
        """The lengths in order, their tokens in that order and the way back, int64 [T]; None where order saves too few calls."""
        lengths = self.lengths
        num_runs = 1 + sum(left != right for left, right in itertools.pairwise(lengths))
        if num_runs - len(set(lengths)) <= self.num_tokens / _TOKENS_PER_CALL:
            return None
        texts = sorted(range(len(lengths)), key=lengths.__getitem__)
        rows = torch.split(torch.arange(self.num_tokens), lengths)
        order_T = torch.cat([rows[text] for text in texts])
        back_T = torch.empty_like(order_T)
        back_T[order_T] = torch.arange(self.num_tokens)
        return [lengths[text] for text in texts], order_T, back_T

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Return each token's row of a padded [B * L] layout, int64 [T], and which places hold a token, bool [B, L]."""
        length_B = self.cu_seq_lens.diff().long()
        device = length_B.device
        text_T = torch.repeat_interleave(torch.arange(len(length_B), device=device), length_B, output_size=self.num_tokens)
        position_T = torch.arange(self.num_tokens, device=device) - self.cu_seq_lens[:-1].long()[text_T]
        return text_T * self.longest + position_T, torch.arange(self.longest, device=device) < length_B.unsqueeze(1)


_latest: _Texts | None = None


def _texts(cu_seq_lens: Tensor, longest: int, num_tokens: int) -> _Texts:
    """Return where the texts lie: every layer of a forward pass asks for the same ones, so the latest are kept."""
    global _latest
    latest = _latest
    # A tensor made in inference mode cannot be kept for a backward pass.
    asked = (longest, num_tokens, torch.is_inference_mode_enabled())
    if latest is None or latest.cu_seq_lens is not cu_seq_lens or (latest.longest, latest.num_tokens, latest.inference) != asked:
        _latest = latest = _Texts(cu_seq_lens, longest, num_tokens)
    return latest


def _attend_by_length(
    query: Tensor, key: Tensor, value: Tensor, texts: _Texts, window: int | None, dropout: float, scaling: float | None
) -> Tensor:
    """One SDPA call per run of texts of equal length, on views; texts are put in order of length first where that saves calls."""
    if texts.by_length is None:
        return _attend_runs(query, key, value, texts.lengths, window, dropout, scaling)
    lengths, order_T, back_T = texts.by_length
    query, key, value = (_reorder(states, order_T, back_T) for states in (query, key, value))
    output = _attend_runs(query, key, value, lengths, window, dropout, scaling)
    return _reorder(output, back_T, order_T)


def _attend_runs(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None, dropout: float, scaling: float | None
) -> Tensor:
    runs = [(length, len(list(run))) for length, run in itertools.groupby(lengths)]
    sizes = [length * count for length, count in runs]
    outputs = []
    parts = (torch.split(states, sizes) for states in (query, key, value))
    for (length, count), *states in zip(runs, *parts, strict=True):
        own = [torch.unflatten(state, 0, (count, length)).transpose(1, 2) for state in states]
        output = _sdpa(own, _band(length, window, query.device), dropout, scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _attend_padded(
    query: Tensor, key: Tensor, value: Tensor, texts: _Texts, window: int | None, dropout: float, scaling: float | None
) -> Tensor:
    """Pad inside attention alone. Written without a wait for the device: sizes come from ``longest`` and the shapes."""
    row_T, is_token_BL = texts.places
    num_texts, longest = is_token_BL.shape

    def pad(states: Tensor) -> Tensor:
        blank = states.new_zeros(num_texts * longest, *states.shape[1:])
        return torch.unflatten(blank.index_copy(0, row_T, states), 0, (num_texts, longest)).transpose(1, 2)

    mask = is_token_BL[:, None, None, :]
    band = _band(longest, window, query.device)
    # Padding sees padding too where a window hides every token from it: a row without any key would be NaN, and so its gradient.
    mask = mask if band is None else (mask & band) | torch.eye(longest, dtype=torch.bool, device=query.device)
    output = _sdpa([pad(states) for states in (query, key, value)], mask, dropout, scaling)
    return output.transpose(1, 2).flatten(0, 1).index_select(0, row_T)


def _attend_varlen(query: Tensor, key: Tensor, value: Tensor, texts: _Texts, window: int | None, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    output = varlen_attn(
        query,
        key,
        value,
        texts.cu_seq_lens,
        texts.cu_seq_lens,
        texts.longest,
        texts.longest,
        scale=scaling,
        window_size=(-1, -1) if window is None else (window, window),
        **grouped,
    )
    assert isinstance(output, Tensor)  # a pair only where more than the output is asked for
    return output


def _has_varlen(query: Tensor) -> bool:
    """Tell whether flash attention takes these: half precision, compute capability 8.0, heads of at most 256 in steps of 8."""
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    if not is_half or query.shape[-1] % 8 or query.shape[-1] > 256 or torch.cuda.get_device_capability(query.device) < (8, 0):
        return False
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None  # since torch 2.10


def _sdpa(states: list[Tensor], mask: Tensor | None, dropout: float, scaling: float | None) -> Tensor:
    query, key, value = states
    is_grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling, enable_gqa=is_grouped)


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which tokens see each other through the window, bool [length, length]; None if all do."""
    if window is None or length <= window + 1:
        return None
    place = torch.arange(length, device=device)
    return (place.unsqueeze(1) - place).abs() <= window


class _Reorder(torch.autograd.Function):
    """Rows in another order; index_select's own gradient would add them one by one, several times slower on a CPU."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return states.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grads[0].index_select(0, back), None, None


def _reorder(states: Tensor, order: Tensor, back: Tensor) -> Tensor:
    reordered: Tensor = _Reorder.apply(states, order, back)  # type: ignore[no-untyped-call]
    return reordered


def register() -> None:
    """Make the attention function and its mask known to transformers under ``ATTENTION``."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, _mask)


def _mask(batch_size: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Return no mask for one row without one: packed, or a single text. Else SDPA's, for features with padding."""
    if attention_mask is None and batch_size == 1:
        return None
    from transformers.masking_utils import sdpa_mask

    mask: Tensor | None = sdpa_mask(batch_size=batch_size, attention_mask=attention_mask, **kwargs)
    return mask


def _why_padded(transformer: Any) -> str | None:
    if transformer.unpad_inputs is False:
        return f"{type(transformer.model).__name__}: unpad_inputs = False"
    # Heads that read a position (sequence classification) and models on other backends: sentence-transformers' own conditions.
    methods = {params["method"] for params in transformer.modality_config.values()}
    is_plain = transformer.backend == "torch" and transformer.transformer_task in ("feature-extraction", "fill-mask")
    if not is_plain or "text" not in transformer.modality_config or methods != {"forward"}:
        return f"{type(transformer.model).__name__}: not a plain text encoder on torch"
    return packable(transformer.model)


@contextlib.contextmanager
def _patched(transformer: Any) -> Iterator[None]:
    """What sentence-transformers sets up for flash attention, with our function in its place."""
    from transformers import DataCollatorWithFlattening

    config = transformer.model.config
    implementation = config._attn_implementation
    names = ("can_flatten_inputs", "data_collator", "model_forward_params", "_flatten_position_offset")
    before = {name: transformer.__dict__[name] for name in names if name in transformer.__dict__}
    transformer.can_flatten_inputs = True
    flatten: Any = DataCollatorWithFlattening
    transformer.data_collator = flatten(return_flash_attn_kwargs=True, return_position_ids=True)
    transformer._flatten_position_offset = transformer._infer_flatten_position_offset()
    if transformer.model_forward_params is not None:
        flattened = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
        transformer.model_forward_params = transformer.model_forward_params | flattened
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = implementation
        for name in names:
            transformer.__dict__.pop(name, None)
        transformer.__dict__.update(before)


def _probe(transformer: Any) -> list[Tensor]:
    """Return the outputs [tokens, width] of each probe text, with dropout off."""
    from sentence_transformers.util import batch_to_device

    window = getattr(transformer.model.config, "sliding_window", None)
    texts = [*_PROBE, *(["b c " * window] if window else [])]  # longer than the window, so that it shows
    with evaluating(transformer), torch.no_grad():
        features = batch_to_device(transformer.preprocess(texts), transformer.model.device)
        outputs: Tensor = transformer(features)["token_embeddings"]
        if "cu_seq_lens_q" in features:
            return list(torch.split(outputs[0], features["cu_seq_lens_q"].diff().tolist()))
        return [output[keep] for output, keep in zip(outputs, features["attention_mask"].bool(), strict=True)]


def _difference(plain: list[Tensor], without_padding: list[Tensor], name: str) -> str | None:
    if [len(output) for output in plain] != [len(output) for output in without_padding]:
        return f"{name}: its texts have other tokens with padding than without"
    left, right = torch.cat(plain).float(), torch.cat(without_padding).float()
    # A model with NaN in it is not ours to refuse: whoever asked for its vectors names the texts.
    difference = float((left - right).nan_to_num().abs().max())
    share = 1e-4 if plain[0].dtype in (torch.float32, torch.float64) else 0.1
    largest = float(left.nan_to_num().abs().max())
    if difference <= share * max(1.0, largest):
        return None
    return f"{name}: its outputs without padding differ by {difference:.2g} of {largest:.2g} on a probe"


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off while the context lasts; each part's own mode comes back after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
