# make demo   the main job on real data       make test   all tests
# make check  what CI runs                    make help   every target
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
# A warning of torch about a dependency's import, of no use to readers of an example.
QUIET := -W 'ignore:`torch.jit:FutureWarning'

.PHONY: help demo test test-oldest test-zoo check format lint types examples bench clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

# One stamp for each set of extras: a second run of any target installs nothing.
$(VENV)/.installed-%: setup.cfg pyproject.toml
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

demo: $(VENV)/.installed-examples  ## train, swap one string, tune, show the result
	$(RUN)/python $(QUIET) examples/quickstart.py

test: $(VENV)/.installed-test  ## all tests
	$(RUN)/python -m pytest

test-zoo: $(VENV)/.installed-zoo  ## published architectures (torchvision, timm, transformers, peft)
	$(RUN)/python -m pytest -m zoo

check: format lint types test examples  ## everything CI runs

format: $(VENV)/.installed-dev
	$(RUN)/ruff format --check .

lint: $(VENV)/.installed-dev
	$(RUN)/ruff check .

types: $(VENV)/.installed-dev
	$(RUN)/mypy

examples: $(VENV)/.installed-examples  ## run the examples, with their assertions
	$(RUN)/python $(QUIET) examples/quickstart.py --quick
	$(RUN)/python $(QUIET) examples/regression.py
	$(RUN)/python $(QUIET) examples/tuning.py --quick
	PYTHONWARNINGS=ignore $(RUN)/torchrun --nproc-per-node 2 examples/distributed.py --quick

bench: $(VENV)/.installed-bench  ## costs on this machine, as JSON
	$(RUN)/python benchmarks/run.py --quick

# The oldest versions supported, in an environment of their own.
.venv-oldest/.installed: setup.cfg pyproject.toml
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet "laplace-torch==0.2.3" "torch==2.4.*" "numpy<2.3" setuptools --editable ".[test]"
	touch $@

test-oldest: .venv-oldest/.installed  ## all tests with laplace-torch 0.2.3 and torch 2.4
	.venv-oldest/bin/python -m pytest

clean:  ## remove environments and caches
	rm -rf .venv .venv-oldest .mypy_cache .ruff_cache .pytest_cache *.egg-info build dist
