# Four verbs for a machine that has python3 and make. Each first makes .venv with what it needs (.ci/install).
.PHONY: demo test bench lint
BIN = .venv/bin

demo: .venv/ready
	$(BIN)/fastssl demo --dir demo

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

# The converter against FFCV's own; make bench IMAGES=/data/imagenet/val for another folder.
IMAGES = demo/images/train
bench: .venv/ready
	test -d $(IMAGES) || $(MAKE) demo
	$(BIN)/python docs/benchmarks/convert_vs_ffcv.py $(IMAGES)

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

.venv/ready: pyproject.toml setup.py .ci/install
	sh .ci/install
	touch .venv/ready
