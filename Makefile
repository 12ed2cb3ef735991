PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := export,cpu,openvino,rtx,bench,dev

.PHONY: venv demo test test-fast test-gpu check budgets clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

demo: venv
	$(BIN)/python export.py --ckpt models/weights/repmlp-digits.safetensors --format onnx,openvino,trt-rtx --out artifacts/repmlp-digits-fp32
	$(BIN)/repmlp-predict artifacts/repmlp-digits-fp32 models/samples/digits/*.png

test: venv
	$(BIN)/python -m pytest

test-fast: venv
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-gpu: venv
	$(BIN)/python -m pytest -m gpu

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/house.py --check
	$(BIN)/python tools/models_table.py --check
	$(BIN)/python tools/gpu_roofline.py --check

budgets: venv
	$(BIN)/python benchmarks/budgets.py

clean:
	rm -rf $(VENV) artifacts dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
