"""One recipe, carried out: each artifact is found by its key or made from the ones before it.

    candidates -> scores of every (query, positive or candidate) pair in the bank -> score table -> student -> evaluation

Each stage returns at once on a hit, without importing torch. Where scores label, every pair of the candidates is scored by
every teacher, not only the pairs that rows use, so that a change of labels never calls a teacher. Where none label, only a
teacher that filters or selects scores; an embedding table has its teacher encode the texts of its rows.
"""

from sparsekd.experiment.sources import Experiment as Experiment
from sparsekd.experiment.stages import candidates as candidates
from sparsekd.experiment.stages import score_table as score_table
from sparsekd.experiment.stages import student as student
from sparsekd.experiment.teacher import trained_teacher as trained_teacher
