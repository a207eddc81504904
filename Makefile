# The whole interface. `make help` lists the targets; RECIPE and SET choose the experiment:
#   make train-student RECIPE=pipeline/recipes/quickstart.toml SET="training.max_steps=50 run.threads=2"
RECIPE ?= pipeline/recipes/quickstart.toml
SET    ?=
PYTHON ?= python3

# The stamp holds the extras that .venv was made with, so EXTRAS need be said once: make setup EXTRAS=gpu (or cpu,ray,export).
INSTALLED := $(file < .venv/.stamp)
EXTRAS    ?= $(or $(INSTALLED),cpu)
RUN       := .venv/bin/python
SETUP     := .venv/.stamp
OPTIONS   := $(foreach pair,$(SET),--set '$(pair)')
# The built-in collection is made only for a recipe that names it; a second call is a hit.
PYDOCS    := data/collections/pydocs
DATA      := $(if $(findstring $(PYDOCS),$(file < $(RECIPE)) $(SET)),data)
BENCHES   := $(filter-out benchmarks/gpu_check.py,$(wildcard benchmarks/*.py))
FAST      := not slow and not gpu and not network
MARKS     ?= not gpu and not network
# A process per core, a file's tests in one of them: what a file sets up once stays so. Files in their order, which begins with the
# longest, tests/e2e and tests/fuzz; by itself xdist begins with the files of most tests, and one core ends alone with the longest.
SPREAD    := --numprocesses=auto --dist=loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: setup data train-teacher teacher-scores train-student evaluate report study test test-all faults lint bench gpu-check clean help FORCE

setup: $(SETUP) ## Make .venv with every pin of constraints.txt; EXTRAS=gpu for FAISS on GPUs (default cpu)

# pip compiles 20,000 modules on one core, 76 s of CPU; compileall does it on all of them, and leaves out what is no Python.
# Other extras than before start from an empty environment: faiss-cpu and faiss-gpu overwrite each other's files.
$(SETUP): pyproject.toml constraints.txt $(if $(and $(INSTALLED),$(filter-out $(INSTALLED),$(EXTRAS))),FORCE)
	rm -f $@
	$(PYTHON) -m venv $(if $(filter $(INSTALLED),$(EXTRAS)),,--clear) .venv
	$(RUN) -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev,quickstart,$(EXTRAS)]'
	$(RUN) -m compileall -qq -j 0 .venv/lib || true
	$(RUN) -m pip check
	printf '%s' '$(EXTRAS)' > $@

data: $(SETUP) ## Build the built-in collection data/collections/pydocs (a hit when it stands)
	$(RUN) data/build_pydocs.py --out $(PYDOCS)

train-teacher: $(SETUP) $(DATA) ## Stage 0, optional: a cross-encoder of your own for RECIPE ([train_teacher])
	$(RUN) pipeline/train_teacher.py $(RECIPE) $(OPTIONS)

teacher-scores: $(SETUP) $(DATA) ## Stage 1: candidates, score bank, score table of RECIPE
	$(RUN) pipeline/teacher_scores.py $(RECIPE) $(OPTIONS)

train-student: $(SETUP) $(DATA) ## Everything: data, stage 1 where missing, the student, its evaluation, its page
	$(RUN) pipeline/train_student.py $(RECIPE) $(OPTIONS)
	$(RUN) pipeline/evaluate.py $(RECIPE) $(OPTIONS)
	$(RUN) pipeline/report.py $(RECIPE) $(OPTIONS)

evaluate: $(SETUP) $(DATA) ## Measure BM25, teachers, untrained and trained student
	$(RUN) pipeline/evaluate.py $(RECIPE) $(OPTIONS)

report: $(SETUP) $(DATA) ## One HTML page of RECIPE as far as it has come; makes nothing else
	$(RUN) pipeline/report.py $(RECIPE) $(OPTIONS)

study: $(SETUP) $(DATA) ## Every member of RECIPE's [study] over one bank, their pages, and one page that compares them
	$(RUN) pipeline/study.py $(RECIPE) $(OPTIONS)

test: $(SETUP) ## Fast tests: offline, CPU
	$(RUN) -m pytest $(SPREAD) -m "$(FAST)"

test-all: $(SETUP) ## Fast and slow tests (faults, end to end); MARKS="slow" for a part
	$(RUN) -m pytest $(SPREAD) -m "$(MARKS)"

faults: $(SETUP) ## The fault matrix, in one process, and its table; make test-all runs it too
	$(RUN) -m pytest -n 0 -q tests/faults

lint: $(SETUP) ## ruff and mypy --strict
	$(RUN) -m ruff check .
	$(RUN) -m mypy

bench: $(SETUP) data ## Every benchmark, on small sizes
	$(or $(foreach script,$(BENCHES),$(RUN) $(script) --quick &&),) true

gpu-check: $(SETUP) ## What can only be checked on a GPU
	$(RUN) benchmarks/gpu_check.py

clean: ## Remove build leftovers; keeps .venv, data/collections and data/cache (teacher scores are expensive)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests pipeline benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## List the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' Makefile | awk -F'\t' '{ printf "  %-15s %s\n", $$1, $$2 }'
