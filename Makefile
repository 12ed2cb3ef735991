PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := export,cpu,openvino,rtx,bench,serve,map,ray,docs,dev
# Two processes, since the tests of full-size networks take gigabytes each; a file's tests stay together, and the order
# of the files is that of tests/conftest.py.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
# Threads that wait for work sleep instead of spinning, which leaves the processor to the other process.
TESTS := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(PARALLEL)

.PHONY: venv demo docs dist test test-fast test-newest test-gpu check budgets clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

demo: venv
	$(BIN)/python export.py --ckpt models/weights/repmlp-digits.safetensors --format onnx,openvino,trt-rtx --out artifacts/repmlp-digits-fp32
	$(BIN)/repmlp-predict artifacts/repmlp-digits-fp32 models/samples/digits/*.png

docs: venv
	$(BIN)/python tools/command_reference.py --check
	$(BIN)/python tools/build_site.py

dist: venv
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

test: venv
	$(TESTS)

test-fast: venv
	$(TESTS) -m "not slow and not gpu"

# The newest releases of everything except the engines of the conversion, in an environment of its own.
PINNED := torch|torchvision|onnx|onnxruntime|openvino|nncf|cuda-python|cuda-bindings
test-newest:
	$(PYTHON) -m venv $(VENV)-newest
	mkdir -p build && grep -E '^($(PINNED))==' constraints.txt > build/pinned.txt
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -c build/pinned.txt -e ".[$(EXTRAS)]"
	$(VENV)-newest/bin/python -m pip list --outdated
	$(VENV)-newest/bin/python -m pytest $(PARALLEL) -m "not slow and not gpu"

test-gpu: venv
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python tools/gpu_report.py --out gpu-report.md

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/house.py --check
	$(BIN)/python tools/models_table.py --check
	$(BIN)/python tools/command_reference.py --check
	$(BIN)/python tools/badges.py --check
	$(BIN)/python tools/gpu_roofline.py --check

budgets: venv
	$(BIN)/python benchmarks/budgets.py

clean:
	rm -rf $(VENV) $(VENV)-newest artifacts dist build site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
