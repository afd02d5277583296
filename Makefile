# make demo   set up what is needed and run the demo: digits, in minutes, on two CPU cores
# make sample set up what is needed and draw emoji from the trained model in pretrained/
# make test   set up what is needed and run all tests
# make docs   the API of all modules, build/api/index.html
# make lint   ruff: lint and format check; shellcheck
# make format ruff: format and fix

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo sample test docs lint format clean

demo: .venv/.installed
	$(BIN)/python launch/train.py --config=configs/demo.py --workdir=runs/demo

sample: .venv/.installed
	$(BIN)/python launch/sample.py --run=emoji64 --n=60 --columns=20

test: .venv/.test-installed
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist worksteal

docs: .venv/.test-installed
	$(BIN)/pdoc --docformat google --output-directory build/api maskdm_jax

lint: .venv/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck launch/*.sh

format: .venv/.test-installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .pytest_cache .ruff_cache

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/.installed: requirements.txt pyproject.toml | .venv/bin/python
	@echo "installing into .venv (a few minutes, once)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.test-installed: requirements-test.txt .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@
