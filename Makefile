# `make book` and `make test` need Python 3.11 to 3.13 and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: book test lint run lab clean

book: $(READY)
	$(BIN)/jahs book

test: $(READY) lint
	$(BIN)/python -m pytest --numprocesses logical --dist loadfile
	$(BIN)/jahs check
	$(BIN)/jahs book --strict --set seed=1
	JAHS_SITE=_build/html $(BIN)/python -m pytest tests/test_site.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

run: $(READY)
	$(BIN)/jahs run $(CHAPTER) --profile $(or $(PROFILE),quick)

lab: $(READY)
	$(BIN)/jupyter lab chapters

clean:
	rm -rf .venv _build

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
