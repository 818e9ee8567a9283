# Everything a newcomer needs: `make demo`, `make quick` before a commit, `make test` before a merge.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread per process: more than the cores makes everything slower, and results depend on it.
export OMP_NUM_THREADS = 1
export TOKENIZERS_PARALLELISM = false
# Unit and numerics tests run on WORKERS processes; those of one file stay together, for they share
# what they start.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -q

.PHONY: setup demo test quick lint all-tests quick-tests slow-tests vllm-env docs clean

# All extras, for the tests need them; the README says which command needs which.
setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[jobs,eval,finetune,curate,dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/python -m jobs.prune

# Lint (one process) runs beside the tests: types take a core for two minutes when nothing is cached.
test: $(READY)
	$(MAKE) --jobs=2 lint all-tests

quick: $(READY)
	$(MAKE) --jobs=2 lint quick-tests

# Integration tests come one after another: they look for Ray's workers on this machine to kill them,
# and each starts two of its own.
all-tests: quick-tests
	$(PYTEST) -m "not slow" --durations=12 tests/integration

# On a real Slurm of two hosts (root): time limits, sweeps, cut links, a second user, bad nodes, dependent
# jobs; 50 minutes.
slow-tests: $(READY)
	TWOFOUR_NEED_SLURM=1 $(PYTEST) -m slow tests/integration

# vLLM for the tests that start its servers (3.4 GB): they are skipped where this was not called.
vllm-env: $(READY)
	$(BIN)/python tests/integration/vllm_rig.py

quick-tests: $(READY)
	$(PYTEST) -n $(WORKERS) --dist loadfile tests --ignore tests/integration

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy sparsify cluster conf jobs
	$(BIN)/lint-imports

# The site, in build/site; a link that leads nowhere or a page that no menu names is an error.
docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) .venv-vllm runs
