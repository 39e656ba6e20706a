# Every target sets up .venv by itself. PYTHON chooses the interpreter; PIP_FLAGS goes to pip install
# (for a CPU-only torch on Linux, say: make demo PIP_FLAGS="--extra-index-url <PyTorch's CPU index>").
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
# Tests that start processes mostly wait, so three at a time keep two cores busy.
QUIET := OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1

.PHONY: demo test check check-style check-tests docs bench clean

demo: .venv/.ok
	$(BIN)/speedrun-mup demo

test: .venv/.ok-dev
	$(QUIET) $(BIN)/python -m pytest -n 3 --dist worksteal

check: .venv/.ok-dev
	@$(MAKE) --no-print-directory -j2 --output-sync=target check-style check-tests

check-style:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check-tests:
	$(QUIET) $(BIN)/python -m pytest -n 3 --dist worksteal -m "not slow and not dist"

# The site, into build/site: open index.html there. A broken link or a page without a place in docs/index.md is an error.
docs: .venv/.ok
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . build/site
	@echo "build/site/docs/index.html"

bench: .venv/.ok
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/mup_overhead.py
	$(BIN)/python benchmarks/sweep_throughput.py
	$(BIN)/python benchmarks/data_speed.py
	$(BIN)/python benchmarks/cpu_speed.py
	$(BIN)/python benchmarks/time_to_loss.py

clean:
	rm -rf .venv build dist *.egg-info

.venv/.ok: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; make demo PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' || \
	  { echo "error: this Python cannot make virtual environments; apt install python3-venv"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e .
	@touch $@

.venv/.ok-dev: .venv/.ok
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[data,text,dev]'
	@touch $@
