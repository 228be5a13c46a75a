PY ?= python3
BIN := .venv/bin

.PHONY: setup demo test docs fuzz test-oldest zero check wheel soak bench gpu
setup: .venv/.ready
.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PY) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e ".[dev,math,plot]"
	touch $@
# What one target alone needs. TRL is the package that a part of the tests compares with.
.venv/.trl .venv/.docs: .venv/.%: .venv/.ready
	$(BIN)/pip install -q -c constraints.txt -e ".[$*]"
	touch $@
demo: setup  # MODEL=folder-or-hub-name trains that instead of a new small model
	HF_HUB_OFFLINE=$(if $(MODEL),$(or $(HF_HUB_OFFLINE),0),1) $(BIN)/python demo/run.py $(MODEL)
test: setup .venv/.trl
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4
# The site in site/: every page in the navigation, every link and anchor checked, nothing loaded from the network.
docs: setup .venv/.docs
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build
fuzz: setup .venv/.trl  # N=cases SEED=number: malformed inputs, about a second for five
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzzer.py --cases $(or $(N),1000) --seed $(or $(SEED),0)
# The oldest libraries in front of those of .venv: torch and the tools of tests are shared.
OLDEST := .venv-oldest
QUICK := tests/data/test_tokenizing.py tests/world/test_files.py tests/trainers/test_trainers.py
LATER := layout_is_the_models # says why Gemma 2 gets rows: it had another attention by default
test-oldest: $(OLDEST)/.ready .venv/.trl
	HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -q -n auto --maxprocesses 4 $(QUICK) -k "not $(strip $(LATER))"
$(OLDEST)/.ready: .venv/.ready constraints-oldest.txt
	rm -rf $(OLDEST) && $(BIN)/python -m venv --without-pip $(OLDEST)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > base.pth
	mv base.pth $$($(OLDEST)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
	$(BIN)/pip --python $(OLDEST)/bin/python install -q -r constraints-oldest.txt
	touch $@
# Runs under ZeRO on two processes, about two minutes. In a folder of its own, because transformers imports DeepSpeed in
# each process where it is installed.
zero: .venv/.zero
	PYTHONPATH=.venv/zero HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m slow tests/invariants/test_sharded.py -k zero
.venv/.zero: .venv/.ready
	DS_BUILD_OPS=0 $(BIN)/pip install -q --no-deps --target .venv/zero deepspeed==0.19.8 \
	einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 py-cpuinfo==9.0.0
	touch $@
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pydoclint -q rlhf
# The package as users get it: alone in an empty environment, asked for its help and its configs.
wheel:
	rm -rf dist .venv-wheel
	$(PY) -m venv .venv-wheel
	.venv-wheel/bin/pip wheel -q --no-deps -w dist .
	.venv-wheel/bin/pip install -q -c constraints.txt dist/*.whl
	HF_HUB_OFFLINE=1 .venv-wheel/bin/python tests/sanity/installed.py
# N=random kills of each job, EVERY=K: aimed kills at each K-th write. With a kill at every write more than an hour.
soak: setup
	PYTHONPATH=tests $(BIN)/python tests/soak/soak.py --random $(or $(N),20) --every $(or $(EVERY),1)
bench: setup .venv/.trl  # MODEL=folder [DATA=folder of rows] adds whole steps of training, half an hour on 2 cores
	$(BIN)/python benchmarks/losses.py
	$(BIN)/python benchmarks/head.py
	$(BIN)/python benchmarks/distillation.py $(if $(MODEL),--model $(MODEL) $(if $(DATA),--data $(DATA)))
	$(if $(MODEL),$(BIN)/python benchmarks/growth.py --model $(MODEL))
	$(if $(MODEL),$(BIN)/python benchmarks/generation.py --model $(MODEL))
	$(if $(MODEL),$(BIN)/python benchmarks/training.py --model $(MODEL) $(if $(DATA),--data $(DATA)))
	$(if $(MODEL),$(if $(DATA),$(BIN)/python benchmarks/online.py --model $(MODEL) --data $(DATA)))
# On a machine whose Python has torch for its GPU, and the package's other dependencies: nothing is installed.
# PYTHON=another; MODEL=folder [DATA=folder of rows] adds steps of that model beside TRL's. About eight minutes.
PYTHON ?= $(or $(wildcard $(BIN)/python),$(PY))
gpu: export PYTHONPATH := $(CURDIR):$(PYTHONPATH)
gpu: export HF_HUB_OFFLINE := 1
gpu:
	@$(PYTHON) -c "import torch; exit(not torch.cuda.is_available())" 2> /dev/null || \
	{ echo "make gpu: $(PYTHON) has no torch that finds a GPU; name another: make gpu PYTHON=python3"; exit 1; }
	status=0; $(PYTHON) -m pytest -q -p no:cacheprovider -m gpu tests || status=1; \
	$(PYTHON) -m benchmarks.gpu || status=1; \
	$(if $(MODEL),$(PYTHON) benchmarks/training.py --model $(MODEL) $(if $(DATA),--data $(DATA)) --case sft dpo || status=1;) \
	exit $$status
