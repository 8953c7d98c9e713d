# make demo   the main job on real data       make test   all tests
# make check  what CI runs                    make help   every target
PYTHON ?= python3
# Another version of laplace-torch, in an environment of its own: make test LAPLACE=0.2.3
LAPLACE ?=
VENV := .venv$(addprefix -,$(LAPLACE))
RUN := $(VENV)/bin
# Tests share no state: each worker takes those of others when it has none left, and has one thread.
PYTEST := python -m pytest -n logical --maxprocesses 4 --dist worksteal
# A warning of torch about a dependency's import, of no use to readers of an example.
QUIET := -W 'ignore:`torch.jit:FutureWarning'

.PHONY: help demo test test-oldest test-zoo test-clients check format lint types docs examples bench release clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

# One stamp for each set of extras: a second run of any target installs nothing.
$(VENV)/.installed-%: setup.cfg pyproject.toml
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet $(addprefix laplace-torch==,$(LAPLACE)) --editable ".[$*]"
	touch $@

demo: $(VENV)/.installed-examples  ## train, swap one string, tune, compare, refuse
	$(RUN)/python $(QUIET) examples/quickstart.py

test: $(VENV)/.installed-test  ## all tests
	OMP_NUM_THREADS=1 $(RUN)/$(PYTEST)

test-zoo: $(VENV)/.installed-zoo  ## published architectures (torchvision, timm, transformers, peft)
	$(RUN)/python -m pytest -m zoo

# In an environment of their own, for what they bring. torch-uncertainty's extra `others` is left out: it wants
# curvlinops-for-pytorch < 3 and scikit-learn < 1.7, which laplace-torch 0.3 and the tests do not.
.venv-clients/.installed: setup.cfg pyproject.toml
	test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --editable ".[clients]"
	touch $@

test-clients: .venv-clients/.installed  ## libraries that use laplace-torch (torch-uncertainty, lightning-uq-box, BoTorch, ...)
	OMP_NUM_THREADS=1 .venv-clients/bin/python -m pytest -m clients

check: format lint types docs test examples  ## everything CI runs

format: $(VENV)/.installed-dev
	$(RUN)/ruff format --check .

lint: $(VENV)/.installed-dev
	$(RUN)/ruff check .

types: $(VENV)/.installed-dev
	$(RUN)/mypy

# The site's tools read the sources, and need none of the package's own requirements.
.venv-docs/.installed: Makefile
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet "mkdocs<2" "mkdocs-material>=9.6" "mkdocstrings-python>=2" ruff
	touch $@

docs: .venv-docs/.installed  ## the documentation as a site, in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build -f .mkdocs.yml --strict

examples: $(VENV)/.installed-examples  ## run the examples, with their assertions, two at a time
	printf '%s --quick\n' examples/segmentation.py examples/quickstart.py examples/ood.py examples/text.py \
		examples/bayesian_optimisation.py examples/active_learning.py examples/tuning.py examples/vit.py \
		examples/migrating.py | OMP_NUM_THREADS=1 xargs -P 2 -L 1 $(RUN)/python $(QUIET)
	$(RUN)/python $(QUIET) examples/regression.py
	PYTHONWARNINGS=ignore $(RUN)/torchrun --nproc-per-node 2 examples/distributed.py --quick
	OMP_NUM_THREADS=1 $(RUN)/python $(QUIET) examples/notebooks/convert.py --run

bench: $(VENV)/.installed-bench  ## costs on this machine, as JSON
	$(RUN)/python -m benchmarks.run --quick

# The oldest versions supported, in an environment of their own.
.venv-oldest/.installed: setup.cfg pyproject.toml
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet "laplace-torch==0.2.3" "torch==2.4.*" "numpy<2.3" setuptools --editable ".[test]"
	touch $@

test-oldest: .venv-oldest/.installed  ## all tests with laplace-torch 0.2.3 and torch 2.4
	OMP_NUM_THREADS=1 .venv-oldest/bin/$(PYTEST)

release:  ## build sdist and wheel, check them, test the installed wheel
	PYTHON=$(PYTHON) .ci/release

clean:  ## remove environments and caches
	rm -rf .venv .venv-* .mypy_cache .ruff_cache .pytest_cache *.egg-info build dist
