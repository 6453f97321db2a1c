# Set-up needs Python 3.11 to 3.13 and pip, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help demo study results test test-isa test-versions lint docs format clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*  ## (.*)$$/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf '%-15s %s\n' "$$name" "$$text"; done

demo: DEMO := outputs/demo/$(shell date +%Y-%m-%d_%H-%M-%S)
demo: $(INSTALLED)  ## train a Bayesian network on real handwritten digits, quantize it to 4 bits
	$(BIN)/bqnn train method=bbb task=digits hydra.run.dir=$(DEMO)/train
	$(BIN)/bqnn quantize checkpoint=$(DEMO)/train/checkpoint.ckpt quant.weight_bits=4 hydra.run.dir=$(DEMO)/quantize

study: $(INSTALLED)  ## run the study of the paper, or what is missing of it; a failed job stops nothing
	-$(BIN)/bqnn train experiment=paper
	-$(BIN)/bqnn quantize experiment=paper_bits
	$(BIN)/bqnn report outputs/study

results: $(INSTALLED)  ## write the tables and figures of docs/ from docs/results/*.csv
	$(BIN)/python benchmarks/results.py

test: $(INSTALLED)  ## run the fast tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto

# The instruction sets that oneDNN may use at most, and what is tested under each: on a CPU with more
# of them, what users of older ones get.
ISAS ?= AVX2 AVX512_CORE DEFAULT
ISA_TESTS ?= tests/layers tests/nets tests/methods tests/inference tests/quant tests/training/test_resume.py \
	tests/commands/test_quantize.py

test-isa: $(addprefix test-isa-,$(ISAS))  ## run the tests that depend on the CPU under older instruction sets

test-isa-AVX2: export ATEN_CPU_CAPABILITY := avx2
test-isa-%: $(INSTALLED)
	ONEDNN_MAX_CPU_ISA=$* OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto $(ISA_TESTS)

test-versions:  ## run the fast tests under other versions; make test-versions PYTHONS=3.12 TORCHES="2.9 newest"
	.ci/versions

lint: $(INSTALLED)  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: export NO_MKDOCS_2_WARNING := 1  # an advertisement of its theme
docs: $(INSTALLED)  ## build the documentation in outputs/site; a broken link is an error
	$(BIN)/mkdocs build --strict

format: $(INSTALLED)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environments and caches
	rm -rf $(VENV) .venvs .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
