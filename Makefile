# Verbs for a machine that has python3 and make. Each first makes .venv with what it needs (.ci/install): .venv/ready is
# the package, .venv/ready-test also what tests and checks need.
.PHONY: demo test bench gpu gpu-pack lint
BIN = .venv/bin

demo: .venv/ready
	$(BIN)/fastssl demo --dir demo

test: .venv/ready-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The converter against FFCV's own; make bench IMAGES=/data/imagenet/val for another folder.
IMAGES = demo/images/train
bench: .venv/ready-test
	test -d $(IMAGES) || $(MAKE) demo
	$(BIN)/python docs/benchmarks/convert_vs_ffcv.py $(IMAGES)

# Everything about this machine's GPU in 8 minutes; make gpu GPU_ARGS='--bench.parts steps' for one part.
gpu: .venv/ready-test
	$(BIN)/fastssl bench gpu $(GPU_ARGS)

# The same for a machine that has PyTorch and a GPU, but no network: dist/gpu-pack/ (there: ./run), and what it has.
PYTHON_TARGET ?= 3.12
GPU_HAVE ?= torch triton torchvision numpy pillow pyyaml timm numba tqdm safetensors tensorboard
gpu-pack: .venv/ready-test
	$(BIN)/python .ci/gpu-pack --python $(PYTHON_TARGET) --have "$(GPU_HAVE)"

lint: .venv/ready-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.venv/ready: pyproject.toml setup.py .ci/install
	sh .ci/install
	touch $@

.venv/ready-test: pyproject.toml setup.py .ci/install
	sh .ci/install test
	touch .venv/ready $@
