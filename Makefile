# Three commands, each of which sets everything up by itself: make demo, make test, make lint.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
CORE := $(VENV)/.core
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
SOURCES := pyproject.toml constraints.txt $(wildcard compressor/lower/_vnm*.c compressor/lower/_vnm*.h)
TYPED := build/typed
# A process that dies ends the tests, which say in which of them it was: by groups, xdist would wait for its others for ever.
WORKERS := -n auto --maxprocesses 4 --dist loadgroup --max-worker-restart 0
SHORT := --steps 20 --set train.batch_size=16 --set evaluate.samples=64 --set evaluate.bootstrap=10 --set evaluate.latency_rounds=3

.PHONY: demo test test-slow lint docs look schema test-levels test-arm fuzz fuzz-readers soak cycles test-nni test-lowest wheel wheel-check

demo: $(CORE)
	$(BIN)/compressor run --method sparsedm --set settings.preset=best --steps 400 --out runs/demo --overwrite

test: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(WORKERS) -m "not slow"

# What starts many processes, or does one thing hundreds of times.
test-slow: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(WORKERS) -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy follows folders, not the packaging's mapping: give it the tree as it is installed
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/compressor
	@ln -s $(CURDIR)/compressor/* $(CURDIR)/plugins $(CURDIR)/model_zoo $(CURDIR)/tests/typed_use.py $(TYPED)/compressor/
	cd $(TYPED) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml
	$(BIN)/codespell $$(git ls-files 2>/dev/null || find . -name '*.md')

# The documentation site, into build/site; a warning is an error.
docs: $(STAMP)
	$(BIN)/python docs/gather.py
	$(BIN)/zensical build --strict

# The site and the demo's report in Chromium, wide and narrow, light and dark: pictures in build/screens, an error where a page is too wide.
look: docs demo
	$(PIP) -e ".[screens]"
	$(BIN)/compressor compare --methods dense-continued,magnitude,structured --seeds 2 --out runs/looked-at --overwrite $(SHORT)
	$(BIN)/compressor run --method structured --out runs/looked-at-run --overwrite $(SHORT)
	$(BIN)/compressor report runs/demo runs/looked-at-run --out runs/looked-at-beside
	$(BIN)/python docs/screens.py runs/demo/report.html runs/looked-at/report.html runs/looked-at-beside build/site

# The JSON schema of report.json, from the types that it is read and written by.
schema: $(STAMP)
	$(BIN)/python -c "from compressor.report.compared import schema_text; print(schema_text(), end='')" > .schema.json
	mv .schema.json compressor/report/schema.json

# At every instruction set of this machine, and AVX-512 and AVX-VNNI emulated.
test-levels: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python tests/levels.py -q

# The kernels for 64-bit Arm, emulated.
test-arm: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python tests/arm.py -q

# Random jobs for the kernels under AddressSanitizer and UndefinedBehaviorSanitizer.
fuzz: $(STAMP)
	OMP_NUM_THREADS=2 $(BIN)/python tests/fuzz_kernels.py --seed $(or $(SEED),0) --seconds $(or $(SECONDS),300)

# Random kill -9 rounds over runs, comparisons, recordings and saves: what is continued ends bit for bit as what was left alone.
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --seed $(or $(SEED),0) --rounds $(or $(ROUNDS),50) --seconds $(or $(SECONDS),3600)

# Pruning, saving, loading and lowering again and again in one process, which must not grow.
cycles: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/cycles.py --seed $(or $(SEED),0) --cycles $(or $(CYCLES),500)

# Hostile files for every reader of files.
fuzz-readers: $(STAMP)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz_readers.py --seed $(or $(SEED),0) --seconds $(or $(SECONDS),300)

# Into dist/: with the kernels inside, for x86-64 and 64-bit Arm.
wheel: $(STAMP)
	$(BIN)/python wheels/build.py

# The one for this machine, in an empty environment without a compiler.
wheel-check: wheel
	$(BIN)/python wheels/check.py "$$(ls -t dist/*-manylinux_*_$$(uname -m).whl | head -1)"

# With the oldest versions that are allowed. torch is the build for CUDA there, which says that there is no GPU.
LOWEST := .venv-lowest/bin/python
test-lowest:
	test -x $(LOWEST) || $(PYTHON) -m venv .venv-lowest
	$(LOWEST) -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e ".[test,onnx,datasets,lora,openvino,pipelines,torchao,trackers]"
	rm -rf diffusion_compressor.egg-info  # which old versions of setuptools leave, and which would be read in place of what is installed
	HF_HUB_OFFLINE=1 $(LOWEST) -m pytest $(WORKERS) -m "not slow" -W "ignore:CUDA is not available" -W 'ignore:`clean_up_tokenization_spaces`'

# NNI wants older versions of some packages, so it has an environment of its own.
test-nni:
	test -x .venv-nni/bin/python || $(PYTHON) -m venv .venv-nni
	grep -v "^filelock==" constraints.txt > .venv-nni/constraints.txt
	.venv-nni/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-nni/constraints.txt -e ".[nni,test]"
	HF_HUB_OFFLINE=1 .venv-nni/bin/python -m pytest tests/test_nni.py

# What a user needs, for the demo.
$(CORE): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $(CORE)

# And what tests, linters and the site need.
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[test,lint,docs,onnx,datasets,lora,torchao,openvino,pipelines,trackers]"
	@# pip would compile on one core; left to the first import, it is done at every start where nothing may be written
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib > /dev/null || true  # some packages ship templates that do not compile
	touch $(CORE) $(STAMP)
