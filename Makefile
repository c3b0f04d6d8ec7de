VENV ?= .venv
PY := $(VENV)/bin/python
PYTHON ?= python3

.PHONY: demo test lint types bench triton-3.6 clean

# Reinstalls only when the requirements changed.
$(VENV)/.installed: pyproject.toml constraints.txt mend_torchvision.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(PY) mend_torchvision.py
	touch $@

demo: $(VENV)/.installed
	$(PY) -m segmenter_fast.cli demo

# Two lanes side by side, one core each. The second one interprets the Triton kernels on the CPU, then tests training and
# benchmarks; its output follows that of the first. Tests marked slow (all builds for all targets among them):
# python -m pytest -m slow
test: $(VENV)/.installed
	@mkdir -p build
	@export OMP_NUM_THREADS=1; \
	( TRITON_INTERPRET=1 $(PY) -m pytest -m interpret && $(PY) -m pytest -m "not interpret and not slow" tests/train tests/benchmarks ) \
	  > build/second.log 2>&1 & second=$$!; \
	$(PY) -m pytest -m "not interpret and not slow" --ignore=tests/train --ignore=tests/benchmarks; first=$$?; \
	wait $$second; second=$$?; \
	cat build/second.log; test $$first -eq 0 -a $$second -eq 0

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(MAKE) --no-print-directory types

# mypy needs the installed layout, in which kernels, train and benchmarks lie below segmenter_fast.
types: $(VENV)/.installed
	rm -rf build/types && mkdir -p build/types/segmenter_fast
	ln -s $(CURDIR)/segmenter_fast/* $(CURDIR)/kernels $(CURDIR)/train $(CURDIR)/benchmarks build/types/segmenter_fast/
	cd build/types && ../../$(VENV)/bin/mypy --config-file ../../pyproject.toml -p segmenter_fast

# Whole models in less than ten minutes on two cores; `segmenter-fast bench --help` says what else there is to measure.
bench: $(VENV)/.installed
	$(PY) -m segmenter_fast.cli bench --out build/bench

# Triton 3.6 beside the installed one, for tests/kernels/test_aot_triton_3_6.py.
triton-3.6: $(VENV)/.installed
	$(PY) -m pip install --quiet --no-deps --upgrade --target build/triton-3.6 triton==3.6.0

clean:
	rm -rf $(VENV) build dist demo *.egg-info
