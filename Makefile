# Set-up needs Python 3.11 to 3.13 and pip, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo study test test-isa test-versions lint format clean

demo: DEMO := outputs/demo/$(shell date +%Y-%m-%d_%H-%M-%S)
demo: $(INSTALLED)  ## train a Bayesian network on real handwritten digits, quantize it to 4 bits
	$(BIN)/python train.py method=bbb task=digits hydra.run.dir=$(DEMO)/train
	$(BIN)/python quantize.py checkpoint=$(DEMO)/train/checkpoint.ckpt quant.weight_bits=4 hydra.run.dir=$(DEMO)/quantize

# The study of the paper. Each part can be changed: make study TASKS=digits BITS=w3a7,w8a4. What is
# done is not done again, so the same command goes on after an interruption.
STUDY ?= outputs/study
METHODS ?= pointwise,bbb,mcdropout,sghmc
TASKS ?= yacht,mnist,cifar10
SEEDS ?= 0,1,2
BITS ?= w3a7,w4a7,w5a7,w6a7,w7a7,w8a7,w8a3,w8a4,w8a5,w8a6
QUANT ?= default
LAUNCHER ?= basic
# Further overrides of the two commands.
TRAIN ?=
TUNE ?=

study: $(INSTALLED)  ## train all in float, quantize the best of each, report; a failed job stops nothing
	-$(BIN)/python train.py -m method=$(METHODS) task=$(TASKS) seed=$(SEEDS) $(TRAIN) resume=true hydra/launcher=$(LAUNCHER) hydra.sweep.dir=$(STUDY)/float
	-$(BIN)/python quantize.py -m 'checkpoint="$(STUDY)/float/*/checkpoint.ckpt"' select=best bits=$(BITS) quant=$(QUANT) quant.fine_tuning.seed=$(SEEDS) $(TUNE) resume=true hydra/launcher=$(LAUNCHER) hydra.sweep.dir=$(STUDY)/quantized
	$(BIN)/python -m bqnn.report $(STUDY)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto

# The instruction sets that oneDNN may use at most, and what is tested under each: on a CPU with more
# of them, what users of older ones get.
ISAS ?= AVX2 AVX512_CORE DEFAULT
ISA_TESTS ?= tests/layers tests/nets tests/methods tests/inference tests/quant tests/training/test_resume.py \
	tests/commands/test_quantize.py

test-isa: $(addprefix test-isa-,$(ISAS))

test-isa-AVX2: export ATEN_CPU_CAPABILITY := avx2
test-isa-%: $(INSTALLED)
	ONEDNN_MAX_CPU_ISA=$* OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto $(ISA_TESTS)

test-versions:  ## the fast tests under other versions; make test-versions PYTHONS=3.12 TORCHES="2.9 newest"
	.ci/versions

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venvs .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@
