"""Laws of the recipe: what it takes, what it refuses, and every message that a user can meet. Imports no torch."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sparsekd.recipe import BM25Miner, BM25Teacher, DenseMiner, FileTeacher, Recipe, Teacher, load_recipe
from sparsekd.recipe.loading import _explain, _is_echo

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "pipeline" / "recipes" / "quickstart.toml"
RECIPES = sorted(QUICKSTART.parent.glob("*.toml"))

COLLECTION = '[collection]\npath = "c"\n'
MINER = '[[mining.miners]]\nkind = "bm25"\nquota = 4\n'
DENSE = '[[mining.miners]]\nkind = "dense"\nquota = 4\nmodel = "e"\n'
TEACHER = '[[teachers]]\nname = "t"\nkind = "dense"\nmodel = "m"\n'
IMPORTED = '[[teachers]]\nname = "f"\nkind = "file"\nimported = "them"\n'
LEXICAL = '[[teachers]]\nname = "l"\nkind = "bm25"\n'
STUDENT = '[student]\nmodel = "s"\n'
WHOLE = COLLECTION + MINER + DENSE + TEACHER + STUDENT

Refusal = Callable[..., str]


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    return tmp_path / "x.toml"


@pytest.fixture
def refusal(recipe_path: Path) -> Refusal:
    """Return the message that refuses a recipe, without the file's name that begins each line."""

    def refuse(text: str, *overrides: str) -> str:
        recipe_path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"\S") as caught:
            load_recipe(recipe_path, overrides)
        return str(caught.value).replace(f"{recipe_path}: ", "")

    return refuse


@pytest.fixture
def load(recipe_path: Path) -> Callable[..., Recipe]:
    def read(text: str, *overrides: str) -> Recipe:
        recipe_path.write_text(text, encoding="utf-8")
        return load_recipe(recipe_path, overrides)

    return read


# What is taken


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_is_one(path: Path) -> None:
    recipe = load_recipe(path)

    assert recipe.teachers


def test_what_a_recipe_leaves_out_has_its_default(load: Callable[..., Recipe]) -> None:
    recipe = load(WHOLE)

    assert (recipe.training.temperature, recipe.labels.kind, recipe.evaluation.split) == (2.0, "score_list", "test")
    assert recipe.run.device == "cpu"
    assert recipe.mining.filter.absolute_margin is None


def test_miners_keep_their_order_and_kind(load: Callable[..., Recipe]) -> None:
    recipe = load(WHOLE)

    assert [type(miner) for miner in recipe.mining.miners] == [BM25Miner, DenseMiner]


def test_a_bm25_teacher_needs_no_model(load: Callable[..., Recipe]) -> None:
    recipe = load(WHOLE + LEXICAL, "teachers.l.b=0.5")

    assert [type(teacher) for teacher in recipe.teachers] == [Teacher, BM25Teacher]
    assert recipe.teachers[1] == BM25Teacher(name="l", kind="bm25", k1=0.9, b=0.5)
    assert [teacher.reference for teacher in recipe.teachers] == ["m", "k1=0.9 b=0.5"]
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_a_teacher_of_imported_scores_says_what_they_were_imported_as(load: Callable[..., Recipe]) -> None:
    recipe = load(WHOLE + IMPORTED, "teachers.f.fields={revision = '2', at = 'x'}")

    assert recipe.teachers[1] == FileTeacher(name="f", kind="file", imported="them", fields={"at": "x", "revision": "2"})
    assert recipe.teachers[1].reference == "them at=x revision=2"
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_a_whole_number_is_taken_where_a_fraction_may_stand(load: Callable[..., Recipe]) -> None:
    recipe = load(WHOLE + "[training]\ntemperature = 1\n")

    assert recipe.training.temperature == 1.0


def test_a_recipe_cannot_be_changed_once_loaded(load: Callable[..., Recipe]) -> None:
    recipe = load(WHOLE)

    with pytest.raises(ValidationError, match="frozen"):
        recipe.student.model = "other"  # type: ignore[misc]


def test_a_recipe_survives_its_own_dump(load: Callable[..., Recipe]) -> None:
    recipe = load(WHOLE, "labels.weights={t = 2}", "training.max_steps=3")

    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


# What is refused: the file


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    path = tmp_path / "gone.toml"

    with pytest.raises(FileNotFoundError) as caught:
        load_recipe(path)

    assert str(caught.value) == f"{path}: no such recipe; expected a TOML file, e.g. pipeline/recipes/quickstart.toml"


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such recipe"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[collection\npath = "c"', "Expected ']' at the end of a table declaration (at line 1, column 12)"),
        (b'[collection]\npath = "c"\npath = "d"', "Cannot overwrite a value"),
        ('[collection]\npath = "ü"'.encode("latin-1"), "'utf-8' codec can't decode byte 0xfc in position 21"),
        (b"a = " + b"9" * 5000, "Exceeds the limit (4300 digits) for integer string conversion"),
        (b"a = " + b"[" * 5000, "recursion"),
    ],
    ids=["syntax", "twice", "latin-1", "long-number", "deep"],
)
def test_what_is_not_toml_is_refused_with_its_place(recipe_path: Path, content: bytes, reason: str) -> None:
    recipe_path.write_bytes(content)

    with pytest.raises(ValueError, match="not valid TOML") as caught:
        load_recipe(recipe_path)

    assert str(caught.value).startswith(f"{recipe_path}: not valid TOML: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed = 0x" + "f" * 5000, "[training] seed: an integer of 20,000 bits; expected at most 64, as TOML has them"),
        ("seed = 18446744073709551616", "[training] seed: an integer of 65 bits; expected at most 64, as TOML has them"),
        ("seed = -1", "[training] seed = -1: input should be greater than or equal to 0"),
        ("seed = 4294967296", "[training] seed = 4294967296: input should be less than 4294967296"),
        ("seed" + ".a" * 5000 + " = 1", f"[training.seed{'.a' * 13}] a: nests deeper than 16 levels; expected a value or a table"),
        ("seed = " + "[" * 300 + "]" * 300, f"[training.seed{'.0' * 13}] 0: nests deeper than 16 levels; expected a value or a "),
        ('loss = "a\\u0000"', "[training] loss: a text with NUL at character 2; expected none"),
        ('"\\u001b[31m\\n" = 1', "[training] '\\x1b[31m\\n' is not a known key; expected one of: loss, "),
        ('"' + "k" * 100_000 + '" = 1', f"[training] '{'k' * 57}' is not a known key; expected one of: loss, "),
        ('seed = "' + "k" * 100_000 + '"', f"[training] seed = '{'k' * 56}...: input should be a valid integer"),
        ("learning_rate = 1e999", "[training] learning_rate = inf: input should be a finite number"),
        ("seed = 1979-05-27", "[training] seed = datetime.date(1979, 5, 27): input should be a valid integer"),
    ],
    ids=["hex", "int64", "negative", "numpy", "keys", "lists", "NUL", "escape", "long key", "long value", "1e999", "date"],
)
def test_what_toml_can_write_and_no_recipe_means_is_refused_in_one_short_line(refusal: Refusal, line: str, message: str) -> None:
    said = refusal(WHOLE + f"[training]\n{line}\n")

    assert said.startswith(message)
    assert len(said) < 700
    assert said.isprintable()


@pytest.mark.parametrize("dress", ["\ufeff{}", "{}\n\n", "# \u2028 é\n{}"], ids=["BOM", "blank", "U+2028"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_what_editors_put_around_a_recipe_changes_nothing(recipe_path: Path, dress: str, line_end: str) -> None:
    recipe_path.write_bytes(dress.format(WHOLE).replace("\n", line_end).encode())

    assert load_recipe(recipe_path) == Recipe.model_validate(tomllib.loads(WHOLE))


def test_a_value_of_set_that_is_no_text_is_refused(recipe_path: Path) -> None:
    recipe_path.write_text(WHOLE, encoding="utf-8")

    with pytest.raises(ValueError, match=r"x\.toml: \[student\] query_prompt: a text that is not Unicode; expected UTF-8$"):
        load_recipe(recipe_path, ["student.query_prompt=\udcff"])


def test_every_line_of_a_refusal_begins_with_the_file(recipe_path: Path) -> None:
    recipe_path.write_text(WHOLE.replace("model", "modle"), encoding="utf-8")

    with pytest.raises(ValueError, match="modle") as caught:
        load_recipe(recipe_path)

    lines = str(caught.value).splitlines()
    assert len(lines) > 1
    assert all(line.startswith(f"{recipe_path}: [") for line in lines)


# What is refused: keys


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (WHOLE + "lambda_pasage = 1", "[student] lambda_pasage is not a known key; did you mean lambda_passage?"),
        (WHOLE + "[labels.calibration]\nkidn = 'raw'", "[labels.calibration] kidn is not a known key; did you mean kind?"),
        (
            WHOLE + "[labels.calibrations.t]\nkidn = 'raw'",
            "[labels.calibrations.t] kidn is not a known key; did you mean kind?",
        ),
        (
            WHOLE + "[labels.calibrations.student]\nkidn = 'raw'",
            "[labels.calibrations.student] kidn is not a known key; did you mean kind?",
        ),
        (WHOLE + "[labels.rescale]\nscal = 1", "[labels.rescale] scal is not a known key; did you mean scale?"),
        (WHOLE + "[trainning]\n", "[top level] trainning is not a known key; did you mean training?"),
        (WHOLE + "[mining.filter]\nxyz = 1", "[mining.filter] xyz is not a known key; expected one of: by, absolute_margin, "),
        ("[collection]\nmax_pasages = 1\n", "[collection] max_pasages is not a known key; did you mean max_passages?"),
        (TEACHER + "max_lenght = 3\n", "[teachers.0] max_lenght is not a known key; did you mean max_length?"),
        (DENSE + MINER + "qota = 3\n", "[mining.miners.1] qota is not a known key; did you mean quota?"),
        (DENSE + "k2 = 3\n", "[mining.miners.0] k2 is not a known key; expected one of: model, "),
        (MINER + "bm25 = 3\n", "[mining.miners.0] bm25 is not a known key; expected one of: kind, "),
        (TEACHER + LEXICAL + "bm25 = 3\n", "[teachers.1] bm25 is not a known key; expected one of: name, kind, k1, b"),
    ],
)
def test_an_unknown_key_is_refused_with_its_place_and_the_nearest(refusal: Refusal, text: str, message: str) -> None:
    lines = refusal(text).splitlines()

    assert sum(line.startswith(message) for line in lines) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            COLLECTION + MINER + TEACHER + LEXICAL + 'model = "m"\n' + STUDENT,
            '[teachers.1] model = \'m\' acts on kind = "dense" or "cross-encoder" or "sparse" or "late-interaction" '
            'or "causal-lm" or "seq2seq-lm" only; remove the key',
        ),
        (
            COLLECTION + MINER + LEXICAL + "max_length = 9\n" + STUDENT,
            '[teachers.0] max_length = 9 acts on kind = "dense" or "cross-encoder" or "sparse" or "late-interaction" '
            'or "causal-lm" or "seq2seq-lm" only; remove the key',
        ),
        (
            COLLECTION + MINER + TEACHER + "k1 = 0.9\n" + STUDENT,
            '[teachers.0] k1 = 0.9 acts on kind = "bm25" only; remove the key',
        ),
        (
            COLLECTION + MINER + 'model = "m"\n' + TEACHER + STUDENT,
            "[mining.miners.0] model = 'm' acts on kind = \"dense\" or \"sparse\" only; remove the key",
        ),
    ],
)
def test_a_key_of_another_kind_is_refused_with_the_kinds_that_it_acts_on(refusal: Refusal, text: str, message: str) -> None:
    assert refusal(text) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINER + TEACHER + STUDENT, "[top level] collection is missing; it has no default"),
        (COLLECTION + MINER + STUDENT, "[top level] teachers is missing; it has no default"),
        (COLLECTION + MINER + TEACHER + "[student]\n", "[student] model is missing; it has no default"),
        (
            COLLECTION + MINER.replace("quota = 4", "") + TEACHER + STUDENT,
            "[mining.miners.0] quota is missing; it has no default",
        ),
        (COLLECTION + "[mining]\n" + TEACHER + STUDENT, "[mining] miners is missing; it has no default"),
        (
            COLLECTION + "[[mining.miners]]\nquota = 4\n" + TEACHER + STUDENT,
            "[mining.miners.0] kind is missing; expected one of: bm25, dense, sparse, run, random",
        ),
        (
            COLLECTION + MINER + '[[teachers]]\nname = "t"\n' + STUDENT,
            "[teachers.0] kind is missing; expected one of: dense, cross-encoder, sparse, "
            "late-interaction, causal-lm, seq2seq-lm, callable, bm25, file",
        ),
        (
            COLLECTION + MINER + IMPORTED.replace("imported", "#") + STUDENT,
            "[teachers.0] imported is missing; it has no default",
        ),
        (COLLECTION + MINER + LEXICAL.replace("name", "b = 0.4 #") + STUDENT, "[teachers.0] name is missing; it has no default"),
    ],
)
def test_a_missing_key_is_named(refusal: Refusal, text: str, message: str) -> None:
    assert refusal(text) == message


# What is refused: values


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('training.batch_size="4"', "[training] batch_size = '4': input should be a valid integer"),
        ("training.batch_size=4.0", "[training] batch_size = 4.0: input should be a valid integer"),
        ("training.batch_size=true", "[training] batch_size = True: input should be a valid integer"),
        ("training.batch_size=0", "[training] batch_size = 0: input should be greater than or equal to 1"),
        ("training.learning_rate=nan", "[training] learning_rate = nan: input should be a finite number"),
        ("training.learning_rate=inf", "[training] learning_rate = inf: input should be a finite number"),
        ("student.lambda_query=-inf", "[student] lambda_query = -inf: input should be a finite number"),
        ("labels.calibration.mean=nan", "[labels.calibration] mean = nan: input should be a finite number"),
        ("mining.miners.0.k1=nan", "[mining.miners.0] k1 = nan: input should be a finite number"),
        ("labels.weights={t = inf}", "[labels.weights] t = inf: input should be a finite number"),
        ("labels.weights={t = -1}", "[labels.weights] t = -1: input should be greater than or equal to 0"),
        ("labels.weights=1", "[labels] weights = 1: expected a table"),
        ("training.loss=SparseMarginMSE", "[training] loss = 'SparseMarginMSE' is not known; did you mean SparseMarginMSELoss?"),
        ("student.regularizer=FLOPs", "[student] regularizer = 'FLOPs' is not known; did you mean FLOPS?"),
        (
            "student.regularizer=none",
            "[student] regularizer = 'none' is not known; expected one of: FLOPS, L1, DF-FLOPS, IDF-FLOPS, or module:Class",
        ),
        ("collection.path=", "[collection] path = '': string should have at least 1 character"),
        ("teachers.t.name=a/b", "[teachers.0] name = 'a/b': string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$'"),
        ("run.device=1979-05-27", "[run] device = datetime.date(1979, 5, 27): input should be a valid string"),
        ("mining.miners.0.kind=bm52", "[mining.miners.0] kind = 'bm52' is not a known miner; did you mean bm25?"),
        (
            "mining.miners.0.kind=colbert",
            "[mining.miners.0] kind = 'colbert' is not a known miner; expected one of: bm25, dense, sparse, run, random",
        ),
        (
            "mining.miners.0.kind=[1]",
            "[mining.miners.0] kind = [1] is not a known miner; expected one of: bm25, dense, sparse, run, random",
        ),
        ("teachers.t.kind=bm52", "[teachers.0] kind = 'bm52' is not a known teacher; did you mean bm25?"),
        (
            "teachers.t.kind=x",
            "[teachers.0] kind = 'x' is not a known teacher; expected one of: dense, cross-encoder, sparse, "
            "late-interaction, causal-lm, seq2seq-lm, callable, bm25, file",
        ),
        ("mining.fallback={quota = 1}", "[mining.fallback] kind is missing; expected one of: bm25, dense, sparse, run, random"),
        (
            "mining.fallback={quota = 1, kind = 'rand'}",
            "[mining.fallback] kind = 'rand' is not a known miner; did you mean random?",
        ),
        (
            "mining.fallback={quota = 1, kind = 'random', skip = 1}",
            "[mining.fallback] skip = 1 acts on kind = \"bm25\" or \"dense\" or \"sparse\" or \"run\" only; remove the key",
        ),
        ("mining.fallback={quota = 1, kind = 'run'}", "[mining.fallback] path is missing; it has no default"),
        ("mining.rounds=0", "[mining] rounds = 0: input should be greater than or equal to 1"),
        ("mining.student_miner.quota=0", "[mining.student_miner] quota = 0: input should be greater than or equal to 1"),
        ("mining.student_miner.qota=1", "[mining.student_miner] qota is not a known key; did you mean quota?"),
        (
            "mining.student_miner.skip=3",
            "[mining.student_miner] skip = 3 has no effect with rounds = 1: no student mines then; set [mining] rounds = 2 or "
            "remove the section",
        ),
        ("mining.miners=[]", "[mining] miners = []: expected at least 1 item"),
        ("mining.miners=[1]", "[mining.miners] 0 = 1: expected a table"),
        ("mining.miners=bm25", "[mining] miners = 'bm25': expected a list of tables, e.g. [[mining.miners]]"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_found_and_expected(refusal: Refusal, override: str, message: str) -> None:
    assert refusal(WHOLE, override) == message


def test_a_value_is_no_section(refusal: Refusal) -> None:
    said = refusal("run = 1\nteachers = 1\n" + COLLECTION + MINER + STUDENT)

    assert said.splitlines() == [
        "[top level] teachers = 1: expected a list of tables, e.g. [[teachers]]",
        "[top level] run = 1: expected a table",
    ]


def test_no_teacher_is_refused(refusal: Refusal) -> None:
    said = refusal("teachers = []\n" + COLLECTION + MINER + STUDENT)

    assert said == "[top level] teachers = []: expected at least 1 item"


def test_an_error_inside_a_list_is_reported_once(refusal: Refusal) -> None:
    said = refusal(WHOLE, "mining.miners.bm25.quota=0", "teachers.t.max_length=0")

    assert said.splitlines() == [
        "[mining.miners.0] quota = 0: input should be greater than or equal to 1",
        "[teachers.0] max_length = 0: input should be greater than or equal to 2",
    ]


# What is refused: sections that disagree


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (WHOLE + TEACHER, [], "[[teachers]] name 't' is used twice; each teacher needs its own"),
        (WHOLE, ["labels.weights={u = 1.0}"], "[labels] weights names 'u', which is no teacher; expected one of ['t']"),
        (
            WHOLE + TEACHER.replace('"t"', '"u"'),
            ["labels.weights.t=1"],
            "[labels] weights leaves out 'u'; name every teacher (0 ignores one) or none",
        ),
        (WHOLE, ["labels.weights.t=0"], "[labels] weights has no positive weight; give at least one teacher a weight above 0"),
        (
            WHOLE,
            ["labels.calibrations.u.kind=rank"],
            "[labels] calibrations names 'u', which is no teacher; expected one of ['t']",
        ),
        (
            WHOLE,
            ["labels.calibration.kind=affine", "labels.calibration.reference=u"],
            "[labels.calibration] reference = 'u' is no teacher; expected one of ['t']",
        ),
        (
            WHOLE,
            ["labels.calibrations.t.kind=zscore", "labels.calibrations.t.reference=t"],
            "[labels.calibrations.t] reference = 't' acts on kind = \"affine\" only, not on \"zscore\"; "
            'set kind = "affine" or remove the key',
        ),
        (
            WHOLE,
            ["labels.rescale={kind = 'affine', reference = 't', std = 2.0}"],
            "[labels.rescale] std = 2.0 beside reference = 't', which gives mean and std; remove one of the two",
        ),
        (
            WHOLE,
            ["labels.rescale.kind=minmax"],
            '[labels.rescale] kind = "minmax" is for one teacher\'s scores; combined scores take "raw" or "zscore" or "affine": '
            "set one of them, or move the section to [labels.calibration]",
        ),
        (WHOLE, ["mining.filter.by=u"], "[mining.filter] by = 'u': expected 'miner' or one of the teachers ['t']"),
        (
            WHOLE,
            ["mining.filter.min_positive=1.5"],
            "[mining.filter] min_positive = 1.5 compares a teacher's scores, and by = 'miner'; set by to one of the teachers ['t']",
        ),
        (
            WHOLE,
            ["mining.fallback={kind = 'random', quota = 9, depth = 8}"],
            "[mining.fallback] depth = 8 is less than skip + quota = 9: the quota can never be filled; raise depth",
        ),
        (
            WHOLE,
            ["mining.fallback={kind = 'run', quota = 9, path = 'x'}", "mining.filter.percentile=95.0"],
            "[mining.filter] by = 'miner' beside a miner of kind = \"run\": a run file need not hold the positives' scores to "
            "compare with; set by to one of the teachers ['t']",
        ),
        (
            WHOLE,
            ["labels.selection_teacher=u"],
            "[labels] selection_teacher = 'u': expected one of the teachers ['t']",
        ),
        (
            WHOLE + TEACHER.replace('"t"', '"u"'),
            ["labels.promote_above=2.5"],
            "[labels] promote_above = 2.5 compares one teacher's scores, and the recipe has 2: ['t', 'u']; "
            "name one as selection_teacher",
        ),
        (
            WHOLE + TEACHER.replace('"t"', '"u"'),
            ["labels.selection=stratified"],
            '[labels] selection = "stratified" covers one teacher\'s range of scores, and the recipe has 2: [\'t\', \'u\']; '
            "name one as selection_teacher",
        ),
        (
            WHOLE,
            ["mining.miners.bm25.skip=97"],
            "[mining.miners.0] depth = 100 is less than skip + quota = 101: the quota can never be filled; raise depth",
        ),
        (
            WHOLE,
            ["mining.rounds=2", "mining.student_miner.skip=93"],
            "[mining.student_miner] depth = 100 is less than skip + quota = 101: the quota can never be filled; raise depth",
        ),
        (
            WHOLE,
            ["mining.rounds=2", "labels.kind=similarity", "training.loss=SparseCoSENTLoss"],
            '[mining] rounds = 2 beside [training] loss = "SparseCoSENTLoss": it trains a student for its cosine, and the student '
            "mines by the dot product; set rounds = 1 or choose another loss",
        ),
        (
            WHOLE,
            ["labels.num_negatives=9"],
            "[labels] num_negatives = 9, but the quotas of the miners add up to 8: every row would be dropped; "
            "raise a quota or lower num_negatives",
        ),
        (
            WHOLE,
            ["labels.kind=margin"],
            '[training] loss = "SparseDistillKLDivLoss" needs [labels] kind = "score_list", not "margin": it compares '
            "distributions over a row's passages, and a softmax over margins leaves the positive out; "
            'or choose loss = "SparseMarginMSELoss"',
        ),
    ],
)
def test_sections_that_disagree_are_refused(refusal: Refusal, text: str, overrides: list[str], message: str) -> None:
    assert refusal(text, *overrides) == message


def test_margins_are_taken_by_margin_mse(load: Callable[..., Recipe]) -> None:
    recipe = load(WHOLE, "labels.kind=margin", "training.loss=SparseMarginMSELoss")

    assert recipe.labels.kind == "margin"


def test_a_filter_may_ask_a_teacher(load: Callable[..., Recipe]) -> None:
    recipe = load(WHOLE, "mining.filter.by=t", "mining.filter.absolute_margin=0.1")

    assert (recipe.mining.filter.by, recipe.mining.filter.absolute_margin) == ("t", 0.1)


# --set: what it may change is said by the same models


def test_set_changes_the_key_that_it_names_and_nothing_else(load: Callable[..., Recipe]) -> None:
    before = load(WHOLE).model_dump()

    after = load(WHOLE, "training.max_steps=3").model_dump()

    before["training"]["max_steps"] = 3
    assert after == before


def test_set_can_complete_a_recipe_before_it_is_checked(load: Callable[..., Recipe]) -> None:
    recipe = load(COLLECTION + MINER + TEACHER, "student.model=s")

    assert recipe.student.model == "s"


def test_an_unknown_key_of_set_is_refused_like_one_of_the_file(refusal: Refusal) -> None:
    said = refusal(WHOLE, "training.max_step=3")

    assert said == "[training] max_step is not a known key; did you mean max_steps?"


# Whatever comes


def _toml_values() -> st.SearchStrategy[Any]:
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("bm25")
    keys = st.sampled_from(["kind", "model", "quota", "name", "weights", "k1", "0", "x"])
    return st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=8)


@settings(deadline=None)  # the machine may be busy
@given(
    section=st.sampled_from([*Recipe.model_fields, "x"]),
    key=st.sampled_from(["model", "miners", "weights", "filter", "calibration", "path", "max_steps", "x"]),
    value=_toml_values(),
)
def test_any_value_gives_a_recipe_or_a_refusal_of_whole_lines(section: str, key: str, value: Any) -> None:
    document = tomllib.loads(WHOLE)
    for changed in ({**document, section: value}, {**document, section: {key: value}}):
        lines = _refusal_of(changed)

        assert all(line.startswith("[") for line in lines)


def _refusal_of(document: dict[str, Any]) -> list[str]:
    try:
        recipe = Recipe.model_validate(document)
    except ValidationError as error:
        said = [_explain(problem) for problem in error.errors() if not _is_echo(problem)]
        assert said, "a refusal without a reason"
        return said
    assert all(math.isfinite(weight) for weight in recipe.labels.weights.values())
    return []


@pytest.mark.parametrize("device", ["warp", "cpu:0", "cuda:", "CUDA"])
def test_a_device_of_no_known_kind_is_refused(refusal: Refusal, device: str) -> None:
    said = refusal(WHOLE, f'run.device="{device}"')

    assert said.startswith(f"[run] device = '{device}': string should match pattern '^(cpu|mps|cuda")


OWN = '[train_teacher]\nname = "mine"\nmodel = "b"\n'


def test_a_recipe_trains_no_teacher_unless_it_says_so(load: Callable[..., Recipe]) -> None:
    assert load(WHOLE).train_teacher is None
    assert load(WHOLE + OWN).train_teacher is not None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "teachers.t.model=trained:mine",
            '[teachers.0] model = "trained:mine" is a cross-encoder, not "dense"; set kind = "cross-encoder"',
        ),
        (
            "train_teacher.num_negatives=9",
            "[train_teacher] num_negatives = 9, but the quotas of the miners add up to 8: every row would be dropped; raise "
            "a quota or lower num_negatives",
        ),
        ("train_teacher.max_lenght=9", "[train_teacher] max_lenght is not a known key; did you mean max_length?"),
        (
            "train_teacher.loss=HingeLoss",
            "[train_teacher] loss = 'HingeLoss': input should be 'LambdaLoss', 'ListNetLoss' or 'RankNetLoss'",
        ),
        (
            'train_teacher.name="a/b"',
            "[train_teacher] name = 'a/b': string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$'",
        ),
    ],
)
def test_what_cannot_train_a_teacher_is_refused(refusal: Refusal, override: str, message: str) -> None:
    assert refusal(WHOLE + OWN, override) == message
