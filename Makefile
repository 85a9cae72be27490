# The words people type. Everything runs in .venv, which the first of them makes.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check up lint docs bench clean

demo: .venv/ready
	$(BIN)/penstock demo --config configs/demo.toml

# Before each commit: within a minute, and without a model.
check: lint
	$(BIN)/python -m pytest tests/unit -m "not gpu" --quiet --numprocesses 2 --dist loadfile

# Three at once on two CPUs, a file in one process: many tests wait for what they have started. `make test K=word` runs
# those alone whose names have the word, `make test N=2` two at once.
N ?= 3
test: lint
	$(BIN)/python -m pytest -m "not gpu" --numprocesses $(N) --dist loadfile --no-loadscope-reorder $(if $(K),-k "$(K)")

up: .venv/ready
	$(BIN)/penstock up --config configs/demo.toml

lint: .venv/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, in site/: a link that leads nowhere is an error.
docs: .venv/dev
	$(BIN)/python -m mkdocs build --strict --quiet

bench: .venv/dev
	$(BIN)/python -m benchmarks.embedding --quick

clean:
	rm -rf .venv .penstock site

# torch comes first and by itself: asked for by another package, pip would take its largest build.
.venv/ready: pyproject.toml constraints.txt hatch_build.py $(wildcard workers/penstock_workers/embedding/kernels*.[ch])
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[workers,flower,bundled]"
	touch .venv/ready

# What tests, benchmarks and checks need besides. langchain-tests goes without what it requires: seven plugins of
# pytest, which would change how all of ours run.
.venv/dev: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[workers,openvino,remote,flower,bundled,lightrag,langchain,llama-index,dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps langchain-tests
	touch .venv/dev
