# Each target sets up .venv by itself the first time (and again when a requirements file changed).
PYTHON ?= python3
BIN := .venv/bin
export PYTHONUNBUFFERED := 1

.PHONY: demo test lint bench gpu clean help

help:
	@echo "make demo    pre-train, evaluate and print the robustness table on built-in pictures (two to five minutes on two CPU cores)"
	@echo "make test    run the tests (8 to 20 minutes on two cores; no network, no GPU)"
	@echo "make lint    the formatter and the linter, as a change has to pass them"
	@echo "make bench   measure speed on this machine, side by side with the usual alternatives; ARGS='--data TREE --photos FOLDER'"
	@echo "make gpu     what waits for a GPU, in steps of ten minutes with records; make gpu ARGS='--cifar TREE', ARGS=--list, ARGS=--toy"
	@echo "make clean   remove .venv, the demo's pictures and its runs"

demo: .venv/run.stamp
	@echo "pre-training, linear evaluation and robustness of MoCo-v2 without and with patch negatives"
	$(BIN)/python nonsem_neg/demo.py

test: .venv/dev.stamp
	@echo "about 2,450 tests, 8 to 20 minutes on two cores, 3 GB of temporary files"
	$(BIN)/python -m pytest

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/dev.stamp
	$(BIN)/python benchmarks/run_all.py $(ARGS)

gpu: .venv/dev.stamp
	$(BIN)/python tools/gpu_day.py $(ARGS)

.venv/run.stamp: requirements.txt
	@echo "setting up .venv: a few GB of PyTorch, one to four minutes"
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info[:2] <= (3, 13) else "error: Python 3.10 to 3.13 is needed, this is %d.%d; make PYTHON=python3.12" % sys.version_info[:2])'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev.stamp: requirements-dev.txt .venv/run.stamp
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv data/demo data/demo-texture runs/demo
