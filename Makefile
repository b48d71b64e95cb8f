# Needs Python 3.11 or newer and this file; everything else goes into .venv.
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false
BIN := .venv/bin
JOBS ?= 2
COVERED := same_selection arrays kernels topk neighbours bm25 sketch mixing ccs cld dsir transport

.PHONY: quickstart test coverage lint docs install clean

quickstart: install  ## the whole loop on a tiny model: extract, select, train, evaluate; prints its table
	$(BIN)/llmselect run recipes/quickstart/recipe.yaml

test: install  ## every test that takes seconds, on two cores
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not slow and not gpu"

coverage: install  ## share of the lines of kernels, selectors and store that their tests run; at least 90 %
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -q -m "not slow and not gpu" $(addprefix tests/test_,$(addsuffix .py,$(COVERED)))
	$(BIN)/coverage report --format=markdown --fail-under=90 >eval/results/coverage.md && tail -n 1 eval/results/coverage.md

lint: install  ## ruff and pyright, no exclude list
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: install  ## the tables of README.md and recipes/papers.md anew, from the methods' docstrings
	$(BIN)/python recipes/generated.py

install:  ## does nothing when .venv is already as pyproject.toml and .ci/constraints.txt say
	@.ci/install

clean:  ## removes what can be made again; runs/ stays
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
