"""Which sections of a recipe go together: refused before anything is loaded, with the reason and what would do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel

from sparsekd.recipe.teacher_training import TRAINED

if TYPE_CHECKING:
    from sparsekd.recipe.sections import Recipe

LOSSES: dict[str, tuple[str, ...]] = {
    "SparseDistillKLDivLoss": ("score_list",),
    "SparseMarginMSELoss": ("score_list", "margin"),
    "SparseMultipleNegativesRankingLoss": ("none", "score_list", "margin"),
    "SparseTripletLoss": ("none", "score_list", "margin"),
    "SparseCoSENTLoss": ("similarity",),
    "SparseAnglELoss": ("similarity",),
    "SparseCosineSimilarityLoss": ("similarity",),
    "SparseMSELoss": ("embedding",),
}
"""Kinds of labels each loss can stand beside; the contrastive two read none and take scores only in a sum with a loss that does."""
REGULARIZERS = ("FLOPS", "L1", "DF-FLOPS", "IDF-FLOPS")
_READS_LABELS = tuple(name for name, kinds in LOSSES.items() if "none" not in kinds)
_CONTRASTIVE = tuple(name for name, kinds in LOSSES.items() if "none" in kinds)
_IN_BATCH = "SparseMultipleNegativesRankingLoss"
_COMPARES_ROWS = (_IN_BATCH, "SparseCoSENTLoss", "SparseAnglELoss")
_BY_COSINE = tuple(name for name, kinds in LOSSES.items() if kinds == ("similarity",))
_REASONS = {
    "SparseDistillKLDivLoss": "it compares distributions over a row's passages, and a softmax over margins leaves the positive out",
    "SparseMarginMSELoss": "it learns signed margins between a positive and its negatives",
    "SparseMultipleNegativesRankingLoss": "it needs a query and its positive in each row",
    "SparseTripletLoss": "it needs a query, its positive and one negative in each row",
    "SparseCoSENTLoss": "it orders pairs by one similarity each",
    "SparseAnglELoss": "it orders pairs by one similarity each",
    "SparseCosineSimilarityLoss": "it moves a pair's cosine to one similarity in [0, 1]",
    "SparseMSELoss": "it moves each text's vector to its teacher's",
}
_REGULARIZED = ("regularizer", "lambda_query", "lambda_passage", "threshold_query", "threshold_passage", "budget")
SPLADE_ONLY = (
    *_REGULARIZED,
    "initial_active_dims",
    "residual_scale",
    "head_warmup_steps",
    "expansion",
    "static_weights",
    "static_frozen",
)
CSR_ONLY = ("hidden_dim", "k", "k_aux", "freeze_body")


def check_names(recipe: Recipe) -> None:
    """Raise ValueError unless every teacher has a name of its own and every name that is used is a teacher's."""
    names = [teacher.name for teacher in recipe.teachers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"[[teachers]] name {twice[0]!r} is used twice; each teacher needs its own")
    weights = recipe.labels.weights
    for name in weights:
        if name not in names:
            raise ValueError(f"[labels] weights names {name!r}, which is no teacher; expected one of {names}")
    left_out = [name for name in names if name not in weights]
    if weights and left_out:
        raise ValueError(f"[labels] weights leaves out {left_out[0]!r}; name every teacher (0 ignores one) or none")
    if weights and not any(weight > 0 for weight in weights.values()):
        raise ValueError("[labels] weights has no positive weight; give at least one teacher a weight above 0")
    if recipe.mining.filter.by not in ("miner", *names):
        raise ValueError(f"[mining.filter] by = {recipe.mining.filter.by!r}: expected 'miner' or one of the teachers {names}")
    if recipe.mining.filter.min_positive is not None and recipe.mining.filter.by == "miner":
        raise ValueError(
            f"[mining.filter] min_positive = {recipe.mining.filter.min_positive:g} compares a teacher's scores, and by = 'miner'; "
            f"set by to one of the teachers {names}"
        )
    runs = [miner for miner in recipe.mining.asked if miner.kind == "run"]
    if runs and recipe.mining.filter.by == "miner" and recipe.mining.filter.reads_scores:
        raise ValueError(
            "[mining.filter] by = 'miner' beside a miner of kind = \"run\": a run file need not hold the positives' scores to "
            f"compare with; set by to one of the teachers {names}"
        )
    selecting = recipe.labels.selection_teacher
    if selecting is not None and selecting not in names:
        raise ValueError(f"[labels] selection_teacher = {selecting!r}: expected one of the teachers {names}")
    if selecting is None and len(names) > 1:
        if recipe.labels.selection == "stratified":
            raise ValueError(
                '[labels] selection = "stratified" covers one teacher\'s range of scores, and the recipe has '
                f"{len(names)}: {names}; name one as selection_teacher"
            )
        if recipe.labels.promote_above is not None:
            raise ValueError(
                f"[labels] promote_above = {recipe.labels.promote_above:g} compares one teacher's scores, and the recipe has "
                f"{len(names)}: {names}; name one as selection_teacher"
            )


def check_candidates_fill_rows(recipe: Recipe) -> None:
    """Raise ValueError if the miners' quotas and depths can never give a row its negatives."""
    for position, miner in enumerate(recipe.mining.asked):
        if miner.depth < miner.skip + miner.quota:
            where = f"miners.{position}" if position < len(recipe.mining.miners) else "fallback"
            raise ValueError(
                f"[mining.{where}] depth = {miner.depth} is less than skip + quota = {miner.skip + miner.quota}: "
                "the quota can never be filled; raise depth"
            )
    proposed = sum(miner.quota for miner in recipe.mining.miners)
    if recipe.labels.num_negatives > proposed:
        raise ValueError(
            f"[labels] num_negatives = {recipe.labels.num_negatives}, but the quotas of the miners add up to {proposed}: "
            "every row would be dropped; raise a quota or lower num_negatives"
        )


def check_rounds(recipe: Recipe) -> None:
    """Raise ValueError if the students of earlier rounds cannot mine, or are told how although there are none."""
    mining = recipe.mining
    asked = mining.student_miner
    if mining.rounds == 1:
        changed = [name for name, field in type(asked).model_fields.items() if getattr(asked, name) != field.default]
        if changed:
            raise ValueError(
                f"[mining.student_miner] {changed[0]} = {getattr(asked, changed[0])} has no effect with rounds = 1: no student "
                "mines then; set [mining] rounds = 2 or remove the section"
            )
        return
    if asked.depth < asked.skip + asked.quota:
        raise ValueError(
            f"[mining.student_miner] depth = {asked.depth} is less than skip + quota = {asked.skip + asked.quota}: "
            "the quota can never be filled; raise depth"
        )
    by_cosine = [name for name in recipe.training.losses if name in _BY_COSINE]
    if by_cosine:
        raise ValueError(
            f'[mining] rounds = {mining.rounds} beside [training] loss = "{by_cosine[0]}": it trains a student for its cosine, and '
            "the student mines by the dot product; set rounds = 1 or choose another loss"
        )


def check_pairings(recipe: Recipe) -> None:
    """Raise ValueError unless labels, losses, wrapper, regularizers and student fit each other, naming what would."""
    for check in (_check_loss_names, _check_student, _check_rows, _check_losses, _check_wrapper, _check_regularizers):
        check(recipe)


def check_train_teacher(recipe: Recipe) -> None:
    """Raise ValueError if [train_teacher] can never have a row, or a teacher of another kind is to be one's own cross-encoder."""
    for position, teacher in enumerate(recipe.teachers):
        model = getattr(teacher, "model", "")
        if model.startswith(TRAINED) and teacher.kind != "cross-encoder":
            raise ValueError(
                f'[teachers.{position}] model = "{model}" is a cross-encoder, not "{teacher.kind}"; set kind = "cross-encoder"'
            )
    section, proposed = recipe.train_teacher, sum(miner.quota for miner in recipe.mining.miners)
    if section is not None and section.num_negatives > proposed:
        raise ValueError(
            f"[train_teacher] num_negatives = {section.num_negatives}, but the quotas of the miners add up to {proposed}: "
            "every row would be dropped; raise a quota or lower num_negatives"
        )


def is_custom(name: str) -> bool:
    """Say whether a loss or regularizer is somebody's own, ``module:Class``."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None


def num_columns(recipe: Recipe) -> int:
    """Return how many texts a row has: 1 for ``embedding``, 2 for ``similarity``, else the query, its positive and negatives."""
    labels = recipe.labels
    if labels.kind in ("embedding", "similarity"):
        return {"embedding": 1, "similarity": 2}[labels.kind]
    return 3 if labels.layout == "triplets" else labels.num_negatives + 2


def wrapper_of(recipe: Recipe) -> str:
    """Return what adds the regularizers: as the recipe says, or what its student and losses take."""
    training = recipe.training
    if training.wrapper is not None:
        return training.wrapper
    if recipe.student.kind == "csr":
        return "CSRLoss"
    if "SparseMSELoss" in training.losses:
        return "none"
    return "CachedSpladeLoss" if training.mini_batch_size is not None else "SpladeLoss"


def _check_loss_names(recipe: Recipe) -> None:
    for key, names, known in (
        ("[training] loss", list(recipe.training.losses), list(LOSSES)),
        ("[student] regularizer", [recipe.student.regularizer], list(REGULARIZERS)),
    ):
        for name in names:
            if name in known or is_custom(name):
                continue
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of: {', '.join(known)}, or module:Class"
            raise ValueError(f"{key} = {name!r} is not known; {hint}")
    if not recipe.training.losses:
        raise ValueError(f"[training] loss names no loss; expected at least one of: {', '.join(LOSSES)}, or module:Class")


def _check_student(recipe: Recipe) -> None:
    """Settings that act on another kind of student than this one, or on nothing."""
    student = recipe.student
    if student.kind == "csr":
        _refuse_set(student, SPLADE_ONLY, 'acts on kind = "splade" only: a csr student has k active dims by construction')
    else:
        _refuse_set(student, CSR_ONLY, 'acts on kind = "csr" only')
    if student.expansion == "both":
        _refuse_set(student, ("static_weights", "static_frozen"), 'needs expansion = "passage" or "query": no side is static')
    else:
        side = "query" if student.expansion == "passage" else "passage"
        reason = f'has no effect with expansion = "{student.expansion}": a {side} has the terms it is written in'
        _refuse_set(student, (f"lambda_{side}", f"threshold_{side}"), reason)
        if student.budget is not None and getattr(student.budget, f"{side}_active_dims") is not None:
            raise ValueError(f"[student.budget] {side}_active_dims {reason}; remove the key")
    if recipe.training.static_learning_rate is not None and (student.expansion == "both" or student.static_frozen):
        none = f'expansion = "{student.expansion}" has none'
        why = "static_frozen = true leaves it as it starts" if student.static_frozen else none
        raise ValueError(
            f"[training] static_learning_rate = {recipe.training.static_learning_rate:g} is for the table of a side without a "
            f"transformer, and [student] {why}; remove the key"
        )
    if student.budget is not None and student.budget.query_active_dims is None and student.budget.passage_active_dims is None:
        raise ValueError("[student.budget] is empty; set query_active_dims, passage_active_dims or both, or remove the section")
    if student.lora_rank is None:
        _refuse_set(student, ("lora_alpha",), "scales adapters, of which there are none: set lora_rank")
    elif student.freeze_body:
        raise ValueError(
            f"[student] lora_rank = {student.lora_rank} beside freeze_body = true: adapters would train what is frozen; remove one"
        )


def _check_rows(recipe: Recipe) -> None:
    """Rows that cannot be made: no negative to compare with, no triplet in a pair, no vector to learn."""
    labels, student = recipe.labels, recipe.student
    if labels.layout == "triplets" and labels.kind in ("similarity", "embedding"):
        raise ValueError(
            f'[labels] layout = "triplets" needs rows of a query, a positive and negatives, but kind = "{labels.kind}" '
            'has none; set layout = "list"'
        )
    if labels.num_negatives == 0 and (labels.kind != "none" or labels.layout == "triplets"):
        where = f'kind = "{labels.kind}"' if labels.kind != "none" else 'layout = "triplets"'
        raise ValueError(
            f'[labels] num_negatives = 0 gives pairs, which only kind = "none", layout = "list" takes; {where} needs at least 1'
        )
    if labels.kind == "embedding":
        sparse = [teacher.name for teacher in recipe.teachers if teacher.kind == "sparse"]
        if len(sparse) != 1:
            raise ValueError(
                '[labels] kind = "embedding" teaches the vectors of one teacher of kind "sparse", but the recipe has '
                f"{len(sparse)}: {sparse}; name exactly one"
            )
        if student.expansion != "both":
            raise ValueError(
                f'[student] expansion = "{student.expansion}" beside [labels] kind = "embedding": queries and passages stand in '
                'one column, which takes one route; set expansion = "both"'
            )
        if student.query_prompt != student.passage_prompt:
            raise ValueError(
                f"[student] query_prompt = {student.query_prompt!r} and passage_prompt = {student.passage_prompt!r} beside "
                '[labels] kind = "embedding": queries and passages stand in one column, which takes one prompt; make them equal'
            )


def _check_losses(recipe: Recipe) -> None:
    """Each loss on its own, then the sum."""
    labels, training = recipe.labels, recipe.training
    for name in training.losses:
        if is_custom(name):
            continue
        kinds = LOSSES[name]
        if labels.kind not in kinds:
            expected = " or ".join(f'"{kind}"' for kind in kinds)
            readers = _CONTRASTIVE if labels.kind == "none" else _READS_LABELS
            fitting = [other for other in readers if labels.kind in LOSSES[other]]
            raise ValueError(
                f'[training] loss = "{name}" needs [labels] kind = {expected}, not "{labels.kind}": {_REASONS[name]}; '
                f"or choose loss = {_either(fitting)}"
            )
        if name == "SparseTripletLoss" and num_columns(recipe) != 3:
            raise ValueError(
                f'[training] loss = "SparseTripletLoss" takes rows of one negative, these have {num_columns(recipe) - 2}; set '
                '[labels] layout = "triplets" (one row per negative) or num_negatives = 1'
            )
        if name == "SparseMSELoss" and len(training.losses) > 1:
            others = [other for other in training.losses if other != name]
            raise ValueError(
                f"[training] loss = SparseMSELoss beside {_either(others)}: it compares whole vectors and stands alone; remove the "
                "others"
            )
        if name in _COMPARES_ROWS and training.batch_size == 1 and (name != _IN_BATCH or num_columns(recipe) == 2):
            raise ValueError(f'[training] batch_size = 1 gives loss = "{name}" nothing to compare a row with; raise it')
    if training.label_scale != 1 and labels.kind not in ("score_list", "margin"):
        raise ValueError(
            f"[training] label_scale = {training.label_scale!r} multiplies score lists and margins, "
            f'[labels] kind = "{labels.kind}" has neither; remove it'
        )
    if labels.kind != "none" and not any(is_custom(name) or name in _READS_LABELS for name in training.losses):
        raise ValueError(
            f'[training] loss = {_either(list(training.losses))} reads no label, so the scores of [labels] kind = "{labels.kind}" '
            'would be ignored; set kind = "none", or add a loss that reads them: '
            f"{_either([name for name in _READS_LABELS if labels.kind in LOSSES[name]])}"
        )


def _check_wrapper(recipe: Recipe) -> None:
    """What stands around the losses."""
    training, wrapper, names = recipe.training, wrapper_of(recipe), list(recipe.training.losses)
    if recipe.student.kind == "csr":
        if "SparseMSELoss" in names or recipe.labels.kind == "embedding":
            raise ValueError(
                '[student] kind = "csr" cannot learn [labels] kind = "embedding": its dims are its own, and its autoencoder needs '
                'the reconstruction that CSRLoss adds; choose kind = "splade"'
            )
        if wrapper != "CSRLoss":
            raise ValueError(
                f'[training] wrapper = "{wrapper}" on a csr student trains its autoencoder without reconstruction; '
                'set wrapper = "CSRLoss" or remove the key'
            )
    elif wrapper == "CSRLoss":
        raise ValueError(
            '[training] wrapper = "CSRLoss" needs [student] kind = "csr": a splade student has no autoencoder to reconstruct with; '
            'set wrapper = "SpladeLoss" or remove the key'
        )
    if recipe.labels.kind == "embedding" and wrapper != "none":
        what = "SparseMSELoss" if "SparseMSELoss" in names else "a row of one text"
        raise ValueError(
            f'[training] wrapper = "{wrapper}" around {what}: the library would pair columns with rows and train every text '
            'towards another\'s vector; set wrapper = "none"'
        )
    if wrapper == "none" and "SparseMSELoss" not in names and (len(names) > 1 or not is_custom(names[0])):
        raise ValueError(
            f'[training] wrapper = "none" leaves {_either(names)} without a regularizer, and the library refuses to run it so; '
            'only SparseMSELoss or one module:Class stands alone: set wrapper = "SpladeLoss" or remove the key'
        )
    if wrapper == "CachedSpladeLoss" and training.mini_batch_size is None:
        raise ValueError('[training] wrapper = "CachedSpladeLoss" needs mini_batch_size, the rows embedded at once; set it')
    if wrapper != "CachedSpladeLoss" and training.mini_batch_size is not None:
        raise ValueError(
            f'[training] mini_batch_size = {training.mini_batch_size} acts in CachedSpladeLoss only, not in "{wrapper}"; remove it'
            + (' or set wrapper = "CachedSpladeLoss"' if wrapper == "SpladeLoss" else "")
        )


def _check_regularizers(recipe: Recipe) -> None:
    """Nothing of the regularizers may be asked of a run that has none."""
    if wrapper_of(recipe) == "none":
        name = next(iter(recipe.training.losses))
        _refuse_set(recipe.student, _REGULARIZED, f"has no effect: {name} stands alone, without a regularizer")


def _refuse_set(section: BaseModel, keys: Iterable[str], reason: str) -> None:
    """Raise ValueError for the first of ``keys`` that the recipe sets.

    A section of which every key is set was dumped by a program, not written by hand: there a default counts as not set.
    """
    dumped = section.model_fields_set >= set(type(section).model_fields)
    for key in keys:
        value = getattr(section, key)
        if key in section.model_fields_set and not (dumped and value == type(section).model_fields[key].default):
            shown = "" if isinstance(value, BaseModel) else f" = {value!r}"
            raise ValueError(f"[student] {key}{shown} {reason}; remove the key")


def _either(names: Sequence[str]) -> str:
    return " or ".join(f'"{name}"' for name in names)
