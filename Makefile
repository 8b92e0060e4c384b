# `make demo` and `make test` do their own set-up; PYTHON chooses the interpreter of the environment (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO ?= runs/digits
DEMO_FLAGS ?= --config.train.steps=600

.PHONY: help setup demo test test-slow mutants parity lint format benchmark gallery constraints clean

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## Create the environment and install the pinned dependencies.

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "jaxdiff needs Python 3.11 or newer; $(PYTHON) is older: make PYTHON=python3.12"; exit 1; }
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --clear --python $(PYTHON) $(VENV) && \
	  uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[train,test,dev]'; \
	else \
	  { $(PYTHON) -m venv --clear $(VENV) || { echo "$(PYTHON) cannot create environments; on Debian or Ubuntu: apt install python3-venv"; exit 1; }; } && \
	  $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,test,dev]'; \
	fi
	@touch $@

constraints:  ## Resolve the pinned versions again (needs uv).
	uv pip compile --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url --all-extras --upgrade pyproject.toml -o constraints.txt

demo: $(STAMP)  ## Train on handwritten digits, draw samples, report bits per dimension: some minutes on two cores.
	$(BIN)/jaxdiff train --config=configs/digits.py --workdir=$(DEMO) $(DEMO_FLAGS)
	$(BIN)/jaxdiff sample --workdir=$(DEMO)
	$(BIN)/jaxdiff likelihood --workdir=$(DEMO) --variable=time --rtol=1e-3 --atol=1e-3

test: $(STAMP)  ## Run the tests, the docstring examples and the check of the import order.
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n 2 --dist=worksteal $(TEST_FLAGS)
	$(BIN)/python -m pytest --types $(TEST_FLAGS)

test-slow: $(STAMP)  ## Run the slow tests: kills, several processes, whole trainings.
	$(BIN)/python -m pytest -n 2 --dist=worksteal -m slow $(TEST_FLAGS)

mutants: $(STAMP)  ## Break one line at a time and see that a test fails, for every row of tests/mutants.py.
	$(BIN)/python tests/mutants.py

parity: .venv-parity/.installed  ## Compare with diffusers, torchdiffeq and PyTorch (Python 3.11; installs PyTorch for the CPU).
	.venv-parity/bin/python -m pytest tests/test_parity*.py

.venv-parity/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv-parity
	.venv-parity/bin/python -m pip install --quiet -c constraints.txt -e '.[train,test]'
	.venv-parity/bin/python -m pip install --quiet torch==2.13.0 diffusers==0.42.1 torchdiffeq==0.2.5
	@touch $@

lint: $(STAMP)  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Format the code.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(STAMP)  ## Measure the overhead over bare network evaluations (on an idle machine).
	$(BIN)/python experiments/benchmarks/overhead.py
	$(BIN)/python experiments/benchmarks/objectives.py
	$(BIN)/python experiments/benchmarks/samplers.py
	$(BIN)/python experiments/benchmarks/likelihood.py

gallery: $(STAMP)  ## Draw all samplers side by side on a 2-D density and on digits (trains both first, six minutes).
	$(BIN)/jaxdiff train --config=configs/toy2d.py --workdir=runs/toy2d
	$(BIN)/jaxdiff train --config=configs/digits.py --workdir=runs/digits
	$(BIN)/python experiments/samplers/gallery.py --toy2d=runs/toy2d --digits=runs/digits

clean:  ## Remove the environment, the caches and the runs.
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache runs
