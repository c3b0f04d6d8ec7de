VENV ?= .venv
PY := $(VENV)/bin/python
PYTHON ?= python3

.PHONY: demo test lint bench clean

# Reinstalls only when the requirements changed.
$(VENV)/.installed: pyproject.toml constraints.txt mend_torchvision.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(PY) mend_torchvision.py
	touch $@

demo: $(VENV)/.installed
	$(PY) -m segmenter_fast.cli demo

# Two passes side by side, one core each: the second interprets the Triton kernels on the CPU, and is shown when both are
# done. What is marked slow, the compilation of every build for every target: python -m pytest -m slow
test: $(VENV)/.installed
	@mkdir -p build
	@export OMP_NUM_THREADS=1; \
	TRITON_INTERPRET=1 $(PY) -m pytest -m interpret > build/interpret.log 2>&1 & interpret=$$!; \
	$(PY) -m pytest -m "not interpret and not slow"; native=$$?; \
	wait $$interpret; interpret=$$?; \
	cat build/interpret.log; test $$native -eq 0 -a $$interpret -eq 0

# mypy needs the installed layout, in which kernels, train and benchmarks lie below segmenter_fast.
lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	rm -rf build/types && mkdir -p build/types/segmenter_fast
	ln -s $(CURDIR)/segmenter_fast/* $(CURDIR)/kernels $(CURDIR)/train $(CURDIR)/benchmarks build/types/segmenter_fast/
	cd build/types && ../../$(VENV)/bin/mypy --config-file ../../pyproject.toml -p segmenter_fast

# Whole models in less than ten minutes on two cores; `segmenter-fast bench --help` says what else there is to measure.
bench: $(VENV)/.installed
	$(PY) -m segmenter_fast.cli bench --out build/bench

clean:
	rm -rf $(VENV) build dist demo *.egg-info
