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

GPU_CONFIGS = $(addprefix supervised/configs/,cifar100 imagenet28 imagenet64 nyu_depth) mae/configs/cifar100 \
	mae/configs/imagenet28 diffusion/configs/cifar10 diffusion/configs/imagenet256
gpu: setup  ## on a machine with a GPU: its tests, the step of every paper config, and CIFAR-10 by ViT-T/1 and /2 (20 minutes)
	$(RUN) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "there is no GPU that torch can use")'
	$(RUN) -m pytest -m gpu
	for patch in 1 2; do $(RUN) -m common.benchmark step --batch 64 --json runs/benchmark/gpu-p$$patch.json \
		--config $(addsuffix .yaml,$(GPU_CONFIGS)) -- --model.patch_size $$patch || exit 1; done
	for patch in 1 2; do $(RUN) -m supervised fit --config supervised/configs/cifar10.yaml --model.patch_size $$patch \
		--trainer.max_epochs 10 --model.optim.warmup_epochs 1 || exit 1; done
	$(RUN) -m common.compare runs/supervised/cifar10-*

lint: setup  ## check the code with ruff
	$(RUN) -m ruff check .
