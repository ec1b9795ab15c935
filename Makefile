# Two commands do everything: `make train` and `make test`. Both set up .venv on first use.
PYTHON ?= python3
GIN_FILE ?= gin_configs/switch_tiny.gin
ARGS ?=

KILLS ?= 100
SEED ?= 1

.PHONY: train test golden faults lint clean

train: .venv/installed
	.venv/bin/python scripts/train.py --gin_file=$(GIN_FILE) $(ARGS)

# In order of path: pytest-xdist would leave files of few tests, here the longest, to the end.
test: .venv/installed
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Writes tests/golden again, after a change that is meant to change it; read the diff.
golden: .venv/installed
	.venv/bin/python -m pytest tests/test_golden.py --update_golden

# Faults done to small runs, compared bit for bit with a run left alone: docs/faults.md.
faults: .venv/installed
	.venv/bin/python -m tests.e2e.faults --kills=$(KILLS) --seed=$(SEED)

lint: .venv/installed
	.venv/bin/pre-commit run --all-files

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "switchx needs Python 3.11 to 3.13; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch .venv/installed

clean:
	rm -rf .venv .pytest_cache runs
