# `make train` and `make test` need Python 3.11 to 3.13 and a package index, and nothing set up before.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: train test lint prove prove-exact prove-processes bench bench-gpu newest clean

train: $(VENV)/.installed
	$(RUN) -m experiments.classify_images --config configs/digits_cnn.py

test: $(VENV)/.installed-test lint
	$(RUN) -m pytest -q -n 2 --dist loadgroup

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The tests that take long, twenty kills at random moments and a hundred flipped bytes; docs/proofs.md keeps what the
# last two printed.
prove: $(VENV)/.installed-test $(VENV)/.installed-bench
	$(RUN) -m pytest -q -n 2 --dist loadgroup -m proof
	$(RUN) -m tests.faults.prove_flips
	$(RUN) -m tests.faults.prove_kill

# Nine layouts of devices and processes, five networks, 200 steps: one hash each; docs/exact.md keeps what it printed.
prove-exact: $(VENV)/.installed-test
	$(RUN) -m tests.prove_exact

# Five networks over 2 and 4 processes, and killed runs that go on with other numbers; docs/processes.md keeps it.
prove-processes: $(VENV)/.installed-test
	$(RUN) -m tests.prove_processes

# 25 minutes on two cores; docs/performance.md keeps what it printed.
bench: $(VENV)/.installed-bench
	$(RUN) -m benchmarks.run

# Under ten minutes on one NVIDIA GPU, once its packages are there; docs/performance-gpu.md keeps what it printed.
bench-gpu: $(VENV)/.installed-gpu
	$(RUN) -m benchmarks.gpu.run

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"jaxdl needs Python 3.11 to 3.13, this is {v[0]}.{v[1]}; try: make PYTHON=python3.13")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable '.[bench]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-gpu: pyproject.toml | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --editable '.[bench-gpu]'
	touch $@ $(VENV)/.installed

# A short selection on the newest JAX that the given Python can have, in an environment of its own.
newest:
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade jax --editable . pytest pytest-xdist hypothesis
	$(VENV)-newest/bin/python -c 'import jax; print("newest JAX:", jax.__version__)'
	$(VENV)-newest/bin/python -m pytest -q -n 2 $(NEWEST)

NEWEST := tests/test_paths.py tests/test_losses.py tests/test_step.py tests/test_loop.py tests/test_third_party.py

clean:
	rm -rf $(VENV) $(VENV)-newest .mypy_cache .pytest_cache .ruff_cache
