# Each target sets up what it needs in .venv first: `make demo` works in a fresh clone.
PYTHON ?= python3
VENV := .venv
GPU_VENV := .venv-gpu
# kserve wants older versions of protobuf and psutil than the others would take
SERVE_VENV := .venv-serve
# Ray and pandas are large, and few need them
RAY_VENV := .venv-ray
CLI := $(VENV)/bin/python cli.py

SYSTEMS := noising paco refdet stripe
# of tests, the longest first; each is a process of its own
GROUPS := test-training test-pages test-export test-commands test-runtime test-systems test-campaign
# Weights of the backbone: none (random, so that no download is needed) | hub | FILE.safetensors
WEIGHTS ?= none

.PHONY: help demo test $(GROUPS) test-serve test-ray campaign mutants lint docs bench test-gpu
.DEFAULT_GOAL := help

help:
	@echo "make demo      draw data, train, export to INT8, infer, evaluate, time: about 12 minutes"
	@echo "make test      all tests"
	@echo "make campaign  hostile files, kills, full disks, long runs, many times over [CAMPAIGN=10]"
	@echo "make mutants   small faults put into the code, and how many the tests find [MUTANTS=300 SEED=0]"
	@echo "make lint      ruff, mypy, import borders"
	@echo "make docs      the documentation as a site, in build/docs"
	@echo "make bench     the commands behind docs/benchmarks.md [DATA=DIR WEIGHTS=hub BACKBONE=NAME]"
	@echo "make test-serve  the tests of the server, in an environment of its own"
	@echo "make test-ray    the tests of batch with Ray, in an environment of its own"
	@echo "make test-gpu  the tests that need a CUDA device; a skip is a failure"

# --- set-up --------------------------------------------------------------------------------------

$(VENV)/.installed: EXTRAS := cpu,refdet,train,docs,dev
$(GPU_VENV)/.installed: EXTRAS := gpu,refdet,train,dev
$(SERVE_VENV)/.installed: EXTRAS := cpu,refdet,serve,clients,dev
$(RAY_VENV)/.installed: EXTRAS := cpu,refdet,ray,dev
%/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("engineworks needs Python 3.11 or newer")'
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@

# of this wheel only the server is used, which asks for no NumPy
$(SERVE_VENV)/.triton: $(SERVE_VENV)/.installed
	$(SERVE_VENV)/bin/python -m pip install --quiet --no-deps nvidia-pytriton==0.7.0
	touch $@

# --- demo ----------------------------------------------------------------------------------------

demo: $(SYSTEMS:%=demo-%)

# one early stage and a small bank: random weights see little further on, and it is quick
demo_noising := --set backbone.weights=$(WEIGHTS) --set "backbone.stages=[1]" \
	--set fit.max_rows=1000

# small pictures and a small net with a finer last map: the marks that tell the moths apart are small
demo_paco := --profile --set backbone.weights=$(WEIGHTS) --set backbone.name=resnet10t \
	--set "backbone.args={output_stride: 16}" --set "preprocess.size=[96, 96]" \
	--set train.epochs=12 --set train.batch_size=16 \
	--set train.optimizer.lr=2e-3 --set train.optimizer.warmup_epochs=1 --set loss.warmup_epochs=2

demo_refdet := --profile --config small
samples_refdet := demo/refdet/data/images/train
pictures_refdet := demo/refdet/data/images/test
infer_refdet := --refs demo/refdet/data/wanted

demo_stripe := --profile --set tiles.repeat=8 --set train.epochs=5
# ranges are measured with defects in sight: strips to train on are good
samples_stripe := demo/stripe/run/painted

demo-%: $(VENV)/.installed
	rm -rf demo/$*
	$(CLI) sample $* --out demo/$*/data
	$(CLI) train $* --data demo/$*/data --out demo/$*/run $(demo_$*)
	$(CLI) export demo/$*/run --out demo/$*/bundle --int8 --num-samples 16 --seconds 1 --eval demo/$*/data \
		--samples $(or $(samples_$*),demo/$*/data/train)
	$(CLI) infer demo/$*/bundle --source $(or $(pictures_$*),demo/$*/data/test) \
		--out demo/$*/pictures --jsonl --save-overlays $(infer_$*)
	[ ! -f demo/$*/data/video.mp4 ] || $(CLI) infer demo/$*/bundle \
		--source demo/$*/data/video.mp4 --out demo/$*/video --jsonl --save-overlays $(infer_$*)
	$(CLI) eval demo/$*/bundle --data demo/$*/data --json demo/$*/metrics.json
	$(CLI) bench demo/$*/bundle --run demo/$*/run --seconds 0.5 --json demo/$*/bench.json
	@echo
	@echo "$*: look at"
	@echo "  demo/$*/pictures/overlays/      each test picture with what was found on it"
	@[ ! -d demo/$*/video ] || echo "  demo/$*/video/video.mp4         the same on a video"
	@echo "  demo/$*/pictures/results.csv    a line per picture"
	@echo "  demo/$*/metrics.json            how well it does on the labelled pictures"
	@echo "  demo/$*/bench.json              the table above"
	@echo "  demo/$*/bundle/                 all that a machine without PyTorch needs"

# --- checks --------------------------------------------------------------------------------------

# two processes at a time, each on a core most of the time: two with two threads each take twice as
# long. The runtime's own never load torch, as on the machines it is made for
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(MAKE) --jobs=2 --output-sync=target $(GROUPS)

test-training: TESTS := tests/training tests/architecture
test-pages: TESTS := tests/test_pages.py
test-commands: TESTS := $(filter-out tests/test_pages.py, $(wildcard tests/test_*.py))
test-export: TESTS := tests/export tests/calibration
test-runtime: TESTS := tests/runtime --ignore=tests/runtime/systems
test-systems: TESTS := tests/runtime/systems
test-campaign: TESTS := tests/batch tests/campaign

$(GROUPS): $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(TESTS)

# N times as many tries as in the ordinary suite
CAMPAIGN ?= 10

campaign: $(VENV)/.installed
	CAMPAIGN=$(CAMPAIGN) $(VENV)/bin/python -m pytest tests/campaign

# a sample of all mutants, drawn with a seed; 0 takes all, which is hours
MUTANTS ?= 300
SEED ?= 0

mutants: $(VENV)/.installed
	$(VENV)/bin/python -m tests.mutants --num $(MUTANTS) --seed $(SEED)

test-gpu: $(GPU_VENV)/.installed
	REQUIRE_GPU=1 $(GPU_VENV)/bin/python -m pytest -m gpu

# without torch, as on a machine that serves
test-serve: $(SERVE_VENV)/.triton
	$(SERVE_VENV)/bin/python -m pytest tests/runtime/serving tests/test_cli_serve.py

# likewise
test-ray: $(RAY_VENV)/.installed
	$(RAY_VENV)/bin/python -m pytest tests/batch tests/test_cli_batch.py

lint: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# every warning is an error
docs: $(VENV)/.installed
	$(VENV)/bin/python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs

# --- benchmarks ----------------------------------------------------------------------------------

BACKBONE ?= resnet18
THREADS ?= 2
DATA ?= bench/data
BENCH := bench/$(BACKBONE)
# its normal pictures, in either layout
GOOD = $(shell ls -d $(DATA)/train/good $(DATA)/images/good 2>/dev/null)

bench/data: | $(VENV)/.installed
	$(CLI) sample noising --out $@

bench: $(VENV)/.installed $(DATA)
	$(CLI) train noising --data $(DATA) --out $(BENCH)/run --exist-ok \
		--set backbone.name=$(BACKBONE) --set backbone.weights=$(WEIGHTS)
	$(CLI) export $(BENCH)/run --out $(BENCH)/bundle --exist-ok --int8 --samples $(GOOD) \
		--num-samples 32 --eval $(DATA) --threads $(THREADS)
	$(CLI) eval $(BENCH)/bundle --data $(DATA) --precision float --json $(BENCH)/float.json
	$(CLI) eval $(BENCH)/bundle --data $(DATA) --precision int8 --json $(BENCH)/int8.json
	$(CLI) bench $(BENCH)/bundle --run $(BENCH)/run --eval $(DATA) --source $(GOOD) \
		--threads $(THREADS) --batch 1,8 --json $(BENCH)/bench.json
