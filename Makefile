# Needs Python 3.11+ and make; everything else is installed into .venv by the first target that wants it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-vllm redis chromium lint format docs clean

demo: .venv/.installed
	$(BIN)/e2p demo

# One process for each core; a file's tests stay in one, since they share what they prepare.
test: .venv/.installed-dev lint
	$(BIN)/python -m pytest -n auto --dist loadfile

# Real vLLM servers on this machine's processors. vLLM wants other versions of libraries, so it has its own environment.
test-vllm: .venv/.installed-dev .venv-vllm/.installed
	E2P_TEST_VLLM=1 $(BIN)/python -m pytest -m vllm tests/vllm

# The store's tests start a real Redis where its program is installed, and are skipped elsewhere.
redis:
	@command -v redis-server >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends redis-server >/dev/null; } \
	  || echo "no redis-server: the tests of the store in Redis are skipped; apt-get install redis-server"

# The playground's test drives a real browser where there is one, and is skipped elsewhere.
chromium:
	@command -v chromedriver >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; } \
	  || echo "no chromium: the playground's test in a browser is skipped; apt-get install chromium chromium-driver"

lint: .venv/.installed-dev
	$(BIN)/ruff check src tests benchmarks docs examples
	$(BIN)/ruff format --check src tests benchmarks docs examples
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

docs: .venv/.installed-dev
	$(BIN)/python docs/generate.py

format: .venv/.installed-dev
	$(BIN)/ruff check --fix src tests benchmarks docs examples
	$(BIN)/ruff format src tests benchmarks docs examples

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "e2p needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[eval]'
	@touch $@

.venv/.installed-dev: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ .venv/.installed

.venv-vllm/.installed: tests/vllm/install.py
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python tests/vllm/install.py
	@touch $@

clean:
	rm -rf .venv .venv-vllm runs .mypy_cache .ruff_cache .pytest_cache
