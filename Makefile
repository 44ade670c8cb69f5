# make demo   train, pack, reload, score and mix on a corpus built from this Python's documentation; no download, no GPU
# make test   the suite, with the same random numbers each time; FRESH=1 draws new ones, FRESH=<seed> those again;
#             SHUFFLE=1 another order of files and tests, SHUFFLE=<seed> that again; T=<section> only the tests of one
#             section of train_gpt.py: settings runtime data model kernels rounding optimizers training curvature
#             artifact scoring ttt mixture run; or T=record, T=bench
# make test-all    the slow tests too, as CI does
# make test-field  all, on torch 2.9.1, Triton 3.5.1, NumPy 1.26, in .venv-field (downloads about 3 GB)
# make prove  a range coder and a decoder: the score is a code length, and hashed counts are none
# make record tables, submission.json, figures and docs/settings.md from the logs that README names; then the checks
#             (the table of systems from logs/systems/*.txt, if there are any)
# make check  the reviewers' checks alone
# make rescore  scores the committed artifact of a demo run again, and compares the digits with its log's
# make view   the text of the last run, coloured by what each token cost and what the counts saved: prints the page's path
# make sample PROMPT="Return the"  text that the last run's model writes (TOKENIZER_PATH=file, if not the demo's)
# make lint   ruff: its checks, and its format at 100 columns; a warning if train_gpt.py has over 160,000 bytes
# make bench  speed and size, as ratios measured in one run; python -m bench.step and so on: one of them, with options
# make bench-gpu  kernels tested, a step and scoring timed, on a GPU (ARTIFACT=file DATA_PATH=... TOKENIZER_PATH=...)
# make clean  removes .venv, .venv-field and the demo's data; other data, logs, checkpoints and artifacts stay
# Each target sets up what it needs in .venv; nothing outside this folder changes.
PYTHON ?= python3
PROMPT ?= The
export PROMPT
VENV := .venv
CONSTRAINTS := constraints.txt
RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest tests -q -n 2 --dist worksteal --durations=8 $(if $(T),--section=$(T))
BENCHES := $(filter-out __init__ gpu_queue,$(basename $(notdir $(wildcard bench/*.py))))
DEV := pytest pytest-xdist hypothesis constriction matplotlib jinja2 scipy safetensors ruff

.PHONY: demo test test-all test-field prove record check rescore view sample lint bench bench-gpu setup clean
setup: $(VENV)/ready

$(VENV)/ready: requirements.txt $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check torch -c $(CONSTRAINTS)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt $(DEV) -c $(CONSTRAINTS)
	touch $@

demo: setup
	$(RUN) data/prepare_demo.py
	PYTHON=$(RUN) bash runs/demo.sh

test: setup
	$(PYTEST) -m "not slow"

test-all: setup
	$(PYTEST)

test-field:
	$(MAKE) test-all VENV=.venv-field CONSTRAINTS=constraints-field.txt

prove: setup
	@$(RUN) tests/prove.py

record: setup
	$(RUN) -m record report
	$(if $(wildcard logs/systems/*.txt),$(RUN) -m record systems logs/systems/*.txt)
	$(RUN) -m record settings
	$(RUN) -m record plot
	$(RUN) -m record check

check: setup
	$(RUN) -m record check

rescore: setup
	$(RUN) data/prepare_demo.py
	$(RUN) -m record rescore

view: setup
	$(RUN) -m record view

sample: setup
	TOKENIZER_PATH=$${TOKENIZER_PATH:-data/tokenizers/demo_1024_bpe.model} $(RUN) -m examples.sample --prompt "$$PROMPT"

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@size=$$(wc -c < train_gpt.py); [ $$size -le 160000 ] || \
	    echo "warning: train_gpt.py has $$size bytes, more than 160,000: is all of it worth reading?"

bench: setup
	for b in $(BENCHES); do $(RUN) -m bench.$$b || exit 1; done

bench-gpu: setup
	$(RUN) data/prepare_demo.py
	$(RUN) -m pytest tests/test_kernels.py -q
	$(RUN) -m bench.step
	DATA_PATH=$${DATA_PATH:-data/datasets/demo_sp1024} TOKENIZER_PATH=$${TOKENIZER_PATH:-data/tokenizers/demo_1024_bpe.model} \
	    $(RUN) -m bench.scoring $(ARTIFACT)

clean:
	rm -rf .venv .venv-field
	cd data && rm -f $(addprefix datasets/demo_sp1024/,fineweb_train_000000.bin fineweb_val_000000.bin corpus.json) \
	    tokenizers/demo_1024_bpe.model
