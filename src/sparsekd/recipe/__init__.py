"""The recipe: one TOML file becomes frozen pydantic models, the only home of defaults.

Everything outside ``[run]`` may change bytes and enters the keys of what it changes; ``[run]`` is recorded and enters none.
Unknown keys are refused with the nearest known one. Imports no torch; loading costs milliseconds.
"""

from sparsekd.recipe.loading import load_recipe as load_recipe
from sparsekd.recipe.loading import recipe_document as recipe_document
from sparsekd.recipe.loading import recipe_of as recipe_of
from sparsekd.recipe.loading import study_members as study_members
from sparsekd.recipe.mining import BM25Miner as BM25Miner
from sparsekd.recipe.mining import DenseMiner as DenseMiner
from sparsekd.recipe.mining import Miner as Miner
from sparsekd.recipe.mining import Mining as Mining
from sparsekd.recipe.mining import NegativeFilter as NegativeFilter
from sparsekd.recipe.mining import RandomMiner as RandomMiner
from sparsekd.recipe.mining import RunMiner as RunMiner
from sparsekd.recipe.mining import SparseMiner as SparseMiner
from sparsekd.recipe.mining import StudentMiner as StudentMiner
from sparsekd.recipe.section import EncoderSpec as EncoderSpec
from sparsekd.recipe.section import ModelSpec as ModelSpec
from sparsekd.recipe.sections import Budget as Budget
from sparsekd.recipe.sections import Calibration as Calibration
from sparsekd.recipe.sections import Collection as Collection
from sparsekd.recipe.sections import Evaluation as Evaluation
from sparsekd.recipe.sections import Labels as Labels
from sparsekd.recipe.sections import Recipe as Recipe
from sparsekd.recipe.sections import Run as Run
from sparsekd.recipe.sections import Student as Student
from sparsekd.recipe.sections import Training as Training
from sparsekd.recipe.study import Member as Member
from sparsekd.recipe.study import Study as Study
from sparsekd.recipe.teacher_training import TRAINED as TRAINED
from sparsekd.recipe.teacher_training import TrainTeacher as TrainTeacher
from sparsekd.recipe.teachers import AnyTeacher as AnyTeacher
from sparsekd.recipe.teachers import BM25Teacher as BM25Teacher
from sparsekd.recipe.teachers import CallableTeacher as CallableTeacher
from sparsekd.recipe.teachers import CausalLMTeacher as CausalLMTeacher
from sparsekd.recipe.teachers import FileTeacher as FileTeacher
from sparsekd.recipe.teachers import Seq2SeqLMTeacher as Seq2SeqLMTeacher
from sparsekd.recipe.teachers import Teacher as Teacher
from sparsekd.recipe.teachers import TokenLogitTeacher as TokenLogitTeacher
