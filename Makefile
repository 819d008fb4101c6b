# Each target sets up what it needs in .venv on a fresh machine with Python 3.11 or later, then runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= auto

.PHONY: demo demo-million demo-sharded figures check test test-all lint perf perf-check readme-numbers mutants clean

demo: $(VENV)/demo.done
	$(BIN)/python -m examples.glyphs $(ARGS)

demo-million: $(VENV)/demo.done
	$(BIN)/python -m examples.million $(ARGS)

# Two processes on this machine, each with half of the classes.
RANKS ?= 2
demo-sharded: $(VENV)/demo.done
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node $(RANKS) \
		-m examples.glyphs.sharded $(ARGS)

# The same tests on other machines: kernels compiled for a GPU and executed on the CPU, or interpreted (tests/conftest.py).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup
KERNELS := tests/kernels tests/training/test_draw.py tests/losses/test_formulas.py
# Tests of the library that launch kernels where there are any.
LAUNCHING := $(addprefix tests/losses/test_,functional.py linear_cross_entropy.py op.py failures.py autograd.py stream.py \
	chunks.py budget.py modules.py golden.py integrations.py) tests/training/test_optim.py tests/training/test_update_in_backward.py
# What differs between GPUs: tiles, how they are loaded, and the memory on the chip that they need.
FEWER := "several_tiles or grids_and_loads or shared_memory"
# The interpreter, 10 ms a program: that it still runs them all.
INTERPRETED := "numbers_and_gradients or loss_and_gradients or test_rules or test_draw or test_formulas"

# The inner loop, under 2 minutes on 2 cores: what breaks first when something does. Values and gradients of every loss on
# both backends at one size, two ranks, a checkpoint that other ranks read.
FIRST := against_the_reference and past and chunk and not chunks
RANKED := same_result_for_any_world_size and some and two or trained_heads_and_optimizers
check: $(VENV)/test.done lint perf-check
	$(PYTEST) -m "not slow" -k "$(FIRST) or $(RANKED)" tests/losses/test_functional.py \
		tests/distributed/test_parallel.py tests/training/test_checkpoint.py
	TRITONMARGIN_TESTS=ttsem-90 $(PYTEST) -k "$(FIRST)" tests/losses/test_functional.py

# What kernels compute, at the sizes and options that most go through; test-all runs every test on every machine.
test: $(VENV)/test.done
	$(PYTEST) -m "not slow" $(ARGS)
	TRITONMARGIN_TESTS=ttsem-90 $(PYTEST) -m "not slow" tests/kernels tests/losses/test_golden.py
	TRITONMARGIN_TESTS=ttsem-80 $(PYTEST) -m "not slow" -k $(FEWER) $(KERNELS)

test-all: $(VENV)/test.done
	$(PYTEST) --ignore tests/perf/test_perf_planted.py $(ARGS)
	$(BIN)/python -m pytest -s tests/perf/test_perf_planted.py  # it takes times: alone
	for machine in ttsem-80 ttsem-90 ttsem-100; do \
		TRITONMARGIN_EVERY=1 TRITONMARGIN_TESTS=$$machine $(PYTEST) -m "not slow or kernels" $(KERNELS) $(LAUNCHING) || exit 1; \
	done
	TRITONMARGIN_TESTS=interpreter $(PYTEST) -m "not slow" -k $(INTERPRETED) $(KERNELS)
	TRITONMARGIN_TESTS=interpreter $(PYTEST) -k compiled_step tests/losses/test_op.py

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Measures this machine and writes the page: perf-results/default/index.html.
perf: $(VENV)/perf.done
	$(BIN)/python -m perf run $(ARGS)

# Counts instead of times: products, passes, operations and allocations of a step, beside the committed ones.
perf-check: $(VENV)/perf.done
	$(BIN)/python -m perf check $(ARGS)

readme-numbers: $(VENV)/perf.done
	$(BIN)/python -m perf readme $(ARGS)

figures: $(VENV)/demo.done
	$(BIN)/python -m examples.figures $(ARGS)

mutants: $(VENV)/test.done $(VENV)/mutants.done
	$(BIN)/python tests/mutants.py $(ARGS)

clean:
	rm -rf $(VENV) .cache build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'tritonmargin needs Python 3.11 or later'"
	$(PYTHON) -m venv $(VENV)

# ttsem executes kernels without a GPU. Its metadata asks for Python 3.12, its code for 3.11; numpy is all it needs.
EXECUTED := --ignore-requires-python ttsem==0.1.0 liger-kernel==0.8.5

# The tests run the demo and the perf suite at tiny sizes, so they need their extras too.
$(VENV)/test.done: EXTRAS := test,perf,demo
$(VENV)/demo.done: EXTRAS := demo
$(VENV)/perf.done: EXTRAS := perf
$(VENV)/dev.done: EXTRAS := dev
$(VENV)/mutants.done: EXTRAS := mutants

$(VENV)/%.done: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	if [ $* = test ]; then $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(EXECUTED); fi
	touch $@
