"""A language model as a Scorer: the logit of its true token less that of its false token, float32, no softmax.

A decoder (Qwen3-Reranker's kind) answers after the filled template, an encoder-decoder (monoT5's kind) by its first decoded token.
transformers loads the model; the output layer is cut to the answer tokens and runs in float32 whatever the body's precision, since
near 20 bfloat16 counts by eighths. Decoders are padded on the right, where causal attention sees no padding, so a pair's score
follows from its own tokens. A prompt over the limit loses the end of its passage, never of template or query, and is counted.
sentence-transformers' LogitScore gives the same number, but cuts a prompt whatever part of it lies at the end, and does not say so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparsekd.model_reference import resolve
from sparsekd.recipe import CausalLMTeacher, Run, TokenLogitTeacher
from sparsekd.teachers.batching import forward_tokens, length_batches
from sparsekd.teachers.finite import require_finite
from sparsekd.teachers.identity import teacher_identity
from sparsekd.teachers.loading import model_arguments, refuse_beyond_positions, require_unchanged

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)


class TokenLogitScorer:
    """Scores pairs in token-budget batches of near-equal length; implements Scorer."""

    def __init__(self, teacher: TokenLogitTeacher, run: Run) -> None:
        self.identity: dict[str, Any] = teacher_identity(teacher)
        self.num_truncated = 0
        self._teacher = teacher
        self._run = run
        # [before, place, between, place, after] where a place is "query" or "passage"
        self._template = re.split(r"\{(query|passage)\}", teacher.filled_template)
        self._tokenizer: Any = None
        self._model: Any = None

    def score(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Return float32 [n] differences of logits (the true token's logit where there is no false token) in input order.

        Passages are cut where a prompt exceeds the limit, counted in ``num_truncated``. Raises ValueError if the prompt without the
        passage leaves no room for one, or if a score is not finite, naming how many and the first.
        """
        import torch

        gold_sim_N = np.empty(len(pairs), dtype=np.float32)
        if not pairs:
            return gold_sim_N
        self._load_once()
        token_ids = self._tokenize(pairs)
        lengths = np.array([len(ids) for ids in token_ids], dtype=np.int64)
        device = self._model.device
        scored = []
        with torch.inference_mode():
            for batch in length_batches(lengths, forward_tokens(self._run.batch_tokens, device.type)):
                scored.append((batch, self._answers([token_ids[position] for position in batch])))
        for batch, scores in scored:  # copied once all are queued: a copy per batch would make a GPU wait for each
            gold_sim_N[batch] = scores.cpu().numpy()
        expected = f'finite logits from {self._teacher.dtype} weights; try dtype = "float32"'
        require_finite(self._teacher.name, pairs, gold_sim_N, expected)
        return gold_sim_N

    def _answers(self, token_ids: list[list[int]]) -> Any:
        """Return float32 [B] on the model's device."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        model = self._model
        lengths_B = torch.tensor([len(ids) for ids in token_ids], device=model.device)
        input_ids_BL = pad_sequence([torch.tensor(ids) for ids in token_ids], batch_first=True).to(model.device)
        if isinstance(self._teacher, CausalLMTeacher):
            logits_BLA = model(input_ids=input_ids_BL, use_cache=False).logits
            logits_BA = logits_BLA[torch.arange(len(token_ids), device=model.device), lengths_B - 1]
        else:
            is_token_BL = torch.arange(input_ids_BL.shape[1], device=model.device) < lengths_B[:, None]
            start_B1 = torch.full((len(token_ids), 1), model.config.decoder_start_token_id, device=model.device)
            outputs = model(input_ids=input_ids_BL, attention_mask=is_token_BL.long(), decoder_input_ids=start_B1, use_cache=False)
            logits_BA = outputs.logits[:, 0]
        return logits_BA[:, 0] - logits_BA[:, 1] if logits_BA.shape[1] == 2 else logits_BA[:, 0]

    def _tokenize(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Return each filled template's token ids, cut to the limit inside the passage."""
        texts, places = [], []
        for pair in pairs:
            text, place = self._filled(*pair)
            texts.append(text)
            places.append(place)
        encodings = self._tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False).encodings
        return [
            encoding.ids if len(encoding.ids) <= self._teacher.max_length else self._cut(encoding, place, pair)
            for encoding, place, pair in zip(encodings, places, pairs, strict=True)
        ]

    def _filled(self, query: str, passage: str) -> tuple[str, tuple[int, int]]:
        """Return the filled template, and where its passage starts and ends."""
        texts = {"query": query, "passage": passage}
        parts = [texts[part] if number % 2 else part for number, part in enumerate(self._template)]
        start = sum(len(part) for part in parts[: self._template.index("passage")])
        return "".join(parts), (start, start + len(passage))

    def _cut(self, encoding: Any, place: tuple[int, int], pair: tuple[str, str]) -> list[int]:
        """Take the last tokens of the passage out; a token that also holds characters of the template stays."""
        limit = self._teacher.max_length
        start, end = place
        inside = [
            position
            for position, (first, last) in enumerate(encoding.offsets)
            if start <= first and last <= end and (first < last or start < first < end)
        ]
        surplus = len(encoding.ids) - limit
        if surplus >= len(inside):
            raise ValueError(
                f"teacher {self._teacher.name!r}: template and query take {len(encoding.ids) - len(inside)} tokens and leave no "
                f"room for a passage (query {pair[0][:80]!r}); expected fewer than the limit of {limit}; raise max_length, or "
                "shorten the query in the collection"
            )
        if not self.num_truncated:
            _log.warning("teacher %s: prompts over %d tokens lose the end of their passage", self._teacher.name, limit)
        self.num_truncated += 1
        dropped = set(inside[-surplus:])
        return [token_id for position, token_id in enumerate(encoding.ids) if position not in dropped]

    def _load_once(self) -> None:
        if self._model is None:
            self._tokenizer, self._model = self._load()

    def _load(self) -> tuple[Any, Any]:
        teacher = self._teacher
        arguments = model_arguments(teacher, self._run)  # first: a wrong device is refused before the slow import
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        folder = str(resolve(teacher.model).path)
        how = {"local_files_only": True, "trust_remote_code": teacher.trust_remote_code}
        tokenizer = AutoTokenizer.from_pretrained(folder, **how)
        ids: Any = tokenizer.convert_tokens_to_ids([token for token in self.identity["tokens"] if token])
        if not tokenizer.is_fast or ids != self.identity["token_ids"]:
            raise ValueError(
                f"model {teacher.model!r}: transformers loads a {type(tokenizer).__name__} with ids {ids} for the answer tokens; "
                f"expected a fast tokenizer and {self.identity['token_ids']}, as tokenizer.json has them; save the tokenizer again"
            )
        self._warn_of_special_tokens(tokenizer)
        auto: Any = AutoModelForCausalLM if isinstance(teacher, CausalLMTeacher) else AutoModelForSeq2SeqLM
        model, report = auto.from_pretrained(folder, output_loading_info=True, **how, **arguments["model_kwargs"])
        require_unchanged(teacher.model, self.identity)
        self._refuse_fresh_weights(folder, report)
        refuse_beyond_positions(model, teacher.model, teacher.max_length)
        if model.get_output_embeddings() is None or (
            not isinstance(teacher, CausalLMTeacher) and model.config.decoder_start_token_id is None
        ):
            raise ValueError(
                f"model {teacher.model!r}: {type(model).__name__} has no output layer or no decoder_start_token_id; expected a "
                "language model whose next token is the answer"
            )
        model.set_output_embeddings(_answer_layer(model.get_output_embeddings(), ids))
        return tokenizer, model.to(arguments["device"]).eval()

    def _warn_of_special_tokens(self, tokenizer: Any) -> None:
        """Say so where the tokenizer would put special tokens around a text and the template does not."""
        template = self._teacher.filled_template
        bare, whole = (tokenizer(template, add_special_tokens=special)["input_ids"] for special in (False, True))
        at = next((place for place in range(len(whole)) if whole[place : place + len(bare)] == bare), 0)
        added = tokenizer.convert_ids_to_tokens([*whole[:at], *whole[at + len(bare) :]])
        if added and not any(token in template for token in added):
            _log.warning(
                "teacher %s: its tokenizer would add %s to a text, the template has none of them and is taken as it is",
                self._teacher.name,
                added,
            )

    def _refuse_fresh_weights(self, folder: str, report: dict[str, Any]) -> None:
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(
                f"teacher {self._teacher.name!r}: {folder} lacks {len(missing)} weights ({', '.join(missing[:4])}), which would be "
                f"drawn at random; expected a whole {self.identity['kind']} checkpoint"
            )


def _answer_layer(head: Any, token_ids: list[int]) -> Any:
    """Return the rows of an output layer that belong to the answer tokens, as a float32 layer."""
    import torch

    class AnswerLayer(torch.nn.Linear):
        """Multiplies in float32 whatever the model's dtype: near 20 a bfloat16 logit moves in steps of 1/8."""

        def forward(self, states: Tensor) -> Tensor:
            return super().forward(states.float())

    layer = AnswerLayer(head.weight.shape[1], len(token_ids), bias=getattr(head, "bias", None) is not None)
    with torch.no_grad():
        layer.weight.copy_(head.weight[token_ids])
        if layer.bias is not None:
            layer.bias.copy_(head.bias[token_ids])
    return layer
