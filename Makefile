PY ?= python3
BIN := .venv/bin

.PHONY: setup demo test check bench
setup: .venv/.ready
.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PY) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e ".[dev,math,plot,trl]"
	touch $@
demo: setup  # MODEL=folder-or-hub-name trains that instead of a new small model
	HF_HUB_OFFLINE=$(if $(MODEL),$(or $(HF_HUB_OFFLINE),0),1) $(BIN)/python demo/run.py $(MODEL)
test: setup
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
bench: setup  # MODEL=folder [DATA=folder of rows] adds whole steps of training, half an hour on 2 cores
	$(BIN)/python benchmarks/losses.py
	$(BIN)/python benchmarks/head.py
	$(BIN)/python benchmarks/distillation.py $(if $(MODEL),--model $(MODEL) $(if $(DATA),--data $(DATA)))
	$(if $(MODEL),$(BIN)/python benchmarks/growth.py --model $(MODEL))
	$(if $(MODEL),$(BIN)/python benchmarks/generation.py --model $(MODEL))
	$(if $(MODEL),$(BIN)/python benchmarks/training.py --model $(MODEL) $(if $(DATA),--data $(DATA)))
	$(if $(MODEL),$(if $(DATA),$(BIN)/python benchmarks/online.py --model $(MODEL) --data $(DATA)))
