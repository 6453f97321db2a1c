# Set-up needs Python 3.11 to 3.13 and pip, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test lint format clean

demo: DEMO := outputs/demo/$(shell date +%Y-%m-%d_%H-%M-%S)
demo: $(INSTALLED)  ## train a Bayesian network on real handwritten digits, quantize it to 4 bits
	$(BIN)/python train.py method=bbb task=digits hydra.run.dir=$(DEMO)/train
	$(BIN)/python quantize.py checkpoint=$(DEMO)/train/checkpoint.ckpt quant.weight_bits=4 hydra.run.dir=$(DEMO)/quantize

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
