# Each target sets up what it needs in .venv on a fresh machine with Python 3.11 or later, then runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= auto

.PHONY: demo test test-all lint perf mutants clean

demo: $(VENV)/demo.done
	$(BIN)/python -m examples.glyphs $(ARGS)

test: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

test-all: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

perf: $(VENV)/perf.done
	$(BIN)/python -m perf run --quick $(ARGS)

mutants: $(VENV)/test.done $(VENV)/mutants.done
	$(BIN)/python tests/mutants.py $(ARGS)

clean:
	rm -rf $(VENV) .cache build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'tritonmargin needs Python 3.11 or later'"
	$(PYTHON) -m venv $(VENV)

# The tests run the demo and the perf suite at tiny sizes, so they need their extras too.
$(VENV)/test.done: EXTRAS := test,perf,demo
$(VENV)/demo.done: EXTRAS := demo
$(VENV)/perf.done: EXTRAS := perf
$(VENV)/dev.done: EXTRAS := dev
$(VENV)/mutants.done: EXTRAS := mutants

$(VENV)/%.done: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@
