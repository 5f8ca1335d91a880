# make demo   from a fresh machine to sharp feature maps of real photographs, about five minutes on two cores
# make test   the tests, on the CPU, without network
# make test-gpu  the tests that need a GPU; without one they are skipped
# make hostile  thousands of damaged files against the commands that read them: CASES=5000, or CASES=600s
# make kills  hundreds of kills, each resumed to the same bits: KILLS=10 of each kind
# make docs   the site of the documentation, in build/site; the reference pages are made again
# make test-docs  the blocks of the documentation and the notebook, with the weights of the demo
# make release-check  sdist and wheel, each installed in a fresh environment and used there
# make check  what continuous integration runs: style, types, tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m uv pip install --quiet --python $(BIN)/python --constraint constraints.txt

CASES ?= 3000
KILLS ?=

.PHONY: demo docs test test-docs test-gpu hostile kills check release-check clean

# Set up again whenever the requirements change. pip installs torch, from wherever it is set up to take it; uv the other 200
# packages, which takes it seconds where pip takes minutes. Bytecode is made of what is imported, not of all that is installed.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch torchvision uv
	$(INSTALL) --editable ".[demo,dev]"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m brixel_cli.demo demo
	$(BIN)/brixel distill --recipe recipes/demo.yaml --overwrite

# Files are shared out over processes of one thread each, as threads of several processes would wait for each other, and
# by name: by their number of tests, the few long ones would come last.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/.ready
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Weights and images of `brixel demo`, without a training.
demo/dinov2_vits14.safetensors: | $(VENV)/.ready
	$(BIN)/brixel demo

test-docs: demo/dinov2_vits14.safetensors
	$(BIN)/python -m pytest -rs tests/test_runnable_documentation.py tests/test_notebook.py

test-gpu: $(VENV)/.ready
	$(BIN)/python -m pytest -m gpu -rs tests/gpu

hostile kills: export OMP_NUM_THREADS = 1
hostile kills: export PYTHONPATH = .:tests

hostile: $(VENV)/.ready
	$(BIN)/python -m hostile $(CASES)

kills: $(VENV)/.ready
	$(BIN)/python -m hostile.kills $(KILLS)

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

docs: $(VENV)/.ready
	$(INSTALL) --editable ".[docs]"
	$(BIN)/python tests/measure/reference_pages.py
	$(BIN)/python -m mkdocs build --strict --site-dir build/site

release-check: $(VENV)/.ready
	$(BIN)/python .ci/release_check.py --constraint $(CURDIR)/constraints.txt

clean:
	rm -rf $(VENV) demo runs dist build .mypy_cache .pytest_cache .ruff_cache
