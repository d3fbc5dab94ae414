# One environment in .venv, made on first use; every target works in a fresh clone.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: report test test-slow test-all bench gpu gpu-lt gpu-bench lab docs clean

report: $(VENV)/ready  ## run the quickstart and print the path of its report
	$(BIN)/fedgal run params/quickstart.yaml

test: $(VENV)/ready  ## a few minutes: export is a no-op, notebooks are clean, one run from start to end, what guards most
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/ready  ## what `make test` leaves out
	$(BIN)/python -m pytest -m slow

test-all: $(VENV)/ready  ## every test
	$(BIN)/python -m pytest

bench: $(VENV)/ready  ## run the benchmarks of speed and write their pages to reports/benchmarks; BENCH="clients engines" chooses
	$(BIN)/python nbs/benchmarks/pages.py $(BENCH)

gpu: $(VENV)/ready  ## a few minutes on a GPU: every part of the library against the CPU, one row each
	$(BIN)/python tests/gpu.py --device cuda

gpu-lt: $(VENV)/ready  ## minutes on a GPU: a published protocol on long-tailed CIFAR-10, PROTOCOL=mixup, wcdas or sfd
	test -d artifacts/gpu_lt || $(BIN)/python tests/gpu_lt.py cut
	FEDGAL_DATA_ROOT=artifacts/gpu_lt $(BIN)/python tests/gpu_lt.py run $(or $(PROTOCOL),mixup)

gpu-bench: $(VENV)/ready  ## under eight minutes on a GPU: pfl-research's benchmark on CIFAR-10, two experiments against the CPU
	$(BIN)/python tests/gpu_bench.py --device cuda

lab: $(VENV)/ready  ## open JupyterLab on the tour; LAB_ARGS='--no-browser --port 8899' are its options
	$(BIN)/fedgal lab $(LAB_ARGS)

docs: $(VENV)/ready  ## write the documentation to docs/index.html
	$(BIN)/fedgal docs

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:  ## remove the environment and all stage outputs; published reports stay
	rm -rf $(VENV) artifacts
