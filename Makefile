# make demo: build an engine from the bundled checkpoint and ask it its name. make test: lint, types, tests.
VENV := .venv
PYTHON := $(VENV)/bin/python
CHECKPOINT := examples/qwen/tiny_qwen_chat
ENGINE := engines/tiny_qwen_chat

.PHONY: demo test

demo: $(VENV)/ready
	$(PYTHON) examples/qwen/build.py --hf_model_dir $(CHECKPOINT) --output_dir $(ENGINE) --dtype float32 \
		--max_input_len 512 --max_output_len 512
	$(PYTHON) examples/qwen/run.py --engine_dir $(ENGINE) --tokenizer_dir $(CHECKPOINT) \
		--input_text "你好，请问你叫什么？"

test: $(VENV)/ready
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2

# With gcc the installation compiles the CPU kernels in C; without it torch's serve.
# A CUDA build of torch brings the triton it needs; beside a CPU build triton serves the tests of the kernels.
$(VENV)/ready: requirements.txt pyproject.toml setup.py $(wildcard tensorrt_llm/kernels/cpu/native/*.[ch])
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . \
		|| $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(PYTHON) -c "import triton" 2>/dev/null || $(PYTHON) -m pip install --quiet --disable-pip-version-check triton==3.6.0
	touch $@
