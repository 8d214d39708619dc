PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: help setup demo test soak gpu lint

help:  ## show this help
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /	/' | expand -t 8

setup: .venv/installed  ## make .venv and install what the suite needs (nothing to do the second time)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

demo: setup  ## train ViT/1 and ViT/2 on handwritten digits, intact and shuffled, and compare them (3 minutes on 2 cores)
	$(RUN) -m common.paper run shuffle --scale demo
	@echo "curves: $(RUN) -m tensorboard.main --logdir runs"

test: setup lint  ## run the test suite (35 minutes on 2 slow cores)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile -m "not soak"

soak: setup  ## run the long fault tests, some take most of 24 GB (35 minutes on 2 slow cores)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile -m soak

gpu: setup  ## on a machine with a GPU: all that only a GPU shows, see common/benchmark/gpu.py (20 minutes on an H200, by estimate)
	$(RUN) -m common.benchmark gpu

lint: setup  ## check the code with ruff
	$(RUN) -m ruff check .
