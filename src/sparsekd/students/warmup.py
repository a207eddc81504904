"""A short masked-LM warm-up of a head that starts as the identity, on the collection's own passages.

Only the head learns (dense, norm, output bias); body and word embeddings stay. Seeded: the same passages give the same head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sparsekd.recipe import Student
from sparsekd.students.fast import decoder_of, hidden_instead_of_logits
from sparsekd.students.masked_lm import head_parameters
from sparsekd.students.routes import splade_route

if TYPE_CHECKING:
    from sentence_transformers import SparseEncoder

PASSAGES_PER_STEP = 32
_SHARE_MASKED = 0.15  # Devlin et al. 2019 (arXiv 1810.04805), appendix A.1, as are the 80 / 10 / 10 below
_SEED = 0
_LEARNING_RATE = 1e-3


def warm_up_head(model: SparseEncoder, passages: Sequence[str], num_steps: int) -> tuple[float, float]:
    """Train the head for ``num_steps`` masked-LM steps over ``passages`` in their order, again from the start where they run out.

    Returns the mean cross-entropy in nats of the first and of the last tenth of the steps. Raises ValueError if the tokenizer
    has no mask token or the passages hold nothing to mask.
    """
    side, transformer, _ = splade_route(model)
    masked_lm: Any = transformer.model
    decoder, prompt = decoder_of(model), model.prompts.get(side) or None
    parameters = head_parameters(masked_lm)
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / num_steps, total_iters=num_steps)
    generator = torch.Generator().manual_seed(_SEED)
    trainable = [parameter for parameter in masked_lm.parameters() if parameter.requires_grad]
    was_training = masked_lm.training
    masked_lm.eval().requires_grad_(False)
    losses = []
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for step in range(num_steps):
            texts = [passages[(step * PASSAGES_PER_STEP + row) % len(passages)] for row in range(PASSAGES_PER_STEP)]
            features = transformer.preprocess(texts[: len(passages)], prompt=prompt)
            features["input_ids"], chosen_BL, target_T = _mask(transformer.tokenizer, features, generator)
            with hidden_instead_of_logits(model):
                hidden_TD = transformer(features)["token_embeddings"][chosen_BL]
            loss = torch.nn.functional.cross_entropy(decoder(hidden_TD), target_T)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    finally:
        for parameter in parameters:
            parameter.grad = None
        for parameter in trainable:
            parameter.requires_grad_(True)
        masked_lm.train(was_training)
    tenth = max(1, num_steps // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


def check_can_warm_up(student: Student, tokenizer: Any) -> None:
    """Raise ValueError if the tokenizer has no mask token."""
    if tokenizer.mask_token_id is None:
        raise ValueError(
            f"[student] head_warmup_steps = {student.head_warmup_steps}: the tokenizer of {student.model} has no mask token; set 0"
        )


def _mask(tokenizer: Any, features: dict[str, Any], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return input ids with some hidden, which were chosen (bool [B, L]), and what they were (int64 [T])."""
    ids_BL: torch.Tensor = features["input_ids"]
    special = torch.tensor(tokenizer.all_special_ids)
    maskable_BL = features["attention_mask"].bool() & ~torch.isin(ids_BL, special)
    chosen_BL = maskable_BL & (torch.rand(ids_BL.shape, generator=generator) < _SHARE_MASKED)
    if not bool(chosen_BL.any()):  # short texts: one token, so that the step has something to learn
        at = maskable_BL.nonzero()
        if len(at) == 0:
            raise ValueError("[student] head_warmup_steps: 32 passages in a row without a word of the vocabulary; set it to 0")
        row, column = at[int(torch.randint(len(at), (), generator=generator))]
        chosen_BL[row, column] = True
    draw_BL = torch.rand(ids_BL.shape, generator=generator)
    random_BL = torch.randint(len(tokenizer.get_vocab()), ids_BL.shape, generator=generator)
    hidden_BL = torch.where(chosen_BL & (draw_BL < 0.8), tokenizer.mask_token_id, ids_BL)
    hidden_BL = torch.where(chosen_BL & (draw_BL >= 0.9), random_BL, hidden_BL)
    return hidden_BL, chosen_BL, ids_BL[chosen_BL]
