PY ?= python3
BIN := .venv/bin

.PHONY: setup test check
setup: .venv/.ready
.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PY) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e ".[dev,trl]"
	touch $@
test: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q
check: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
