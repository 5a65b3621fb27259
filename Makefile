# `make reproduce`, `make test` and `make docs` work on a bare machine with Python >= 3.11; all reuse what they have installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)

.PHONY: reproduce test quick test-lab soak docs prepare lessons clean

reproduce: $(VENV)/.notebooks
	$(BIN)/refcomm reproduce --quick --into results

test: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" bash .ci/check

# the tests that are not marked slow, in less than ten minutes on two cores
quick: $(VENV)/.dev
	OMP_NUM_THREADS=1 REFCOMM_PROGRESS=off $(BIN)/python -m pytest -q -n auto -m "not slow and not lab"

# the site, in _docs/html: nbdev's processed notebooks through Sphinx
docs: $(VENV)/.dev
	$(BIN)/python .ci/docs/build.py

# JupyterLab in headless Chromium, which must be on the PATH; where anything is lacking the tests are skipped and say what
test-lab: $(VENV)/.dev $(VENV)/.browser
	$(BIN)/python -m pytest -q -rs -m lab

# some twenty minutes on two quiet cores: a reproduction stopped by three signals and resumed, damaged files of all kinds, several drivers on one store; writes tests/soak.md
soak: $(VENV)/.dev
	$(BIN)/python tests/soak.py

# what a commit needs: modules and README from notebooks, notebooks without noise
prepare: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" bash .ci/prepare

# execute the library notebooks, the tutorials and the index in place, so that their small outputs are fresh
lessons: $(VENV)/.dev
	PATH="$(CURDIR)/$(BIN):$$PATH" REFCOMM_PROGRESS=off $(BIN)/jupyter nbconvert --to notebook --execute --inplace nbs/[0-9]*.ipynb nbs/tutorials/*.ipynb nbs/index.ipynb

clean:
	rm -rf $(VENV) build dist *.egg-info _proc _docs

$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
ifneq ($(UV),)
	uv pip install --quiet --python $(BIN)/python -e ".[$*]"
else
	$(BIN)/python -m pip install --quiet -e ".[$*]"
endif
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"refcomm needs Python >= 3.11, {sys.executable} is {sys.version.split()[0]}: use make PYTHON=/path/to/python3.11")'
ifneq ($(UV),)
	uv venv --quiet --allow-existing --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV)
else
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
endif
