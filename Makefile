# Every target makes its own environment in .venv when it must.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo docs test quick lint bench clean

demo: .venv/demo
	$(BIN)/vggtorch demo

# The site in site/; `mkdocs serve` shows it while you write.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Each process computes with one thread, so that they don't wait for one another.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test: .venv/dev
	$(TEST)

quick: .venv/dev
	$(TEST) -m "not slow"

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy vggtorch tests benchmarks

# benchmarks/transfer.py and `replacement.py probe` need CIFAR-10 as folders, so they aren't here.
bench: .venv/dev
	$(BIN)/python benchmarks/forward.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/fit.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/replacement.py match
	$(BIN)/python benchmarks/replacement.py speed

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The stamp .venv/EXTRA says that the project is installed with that extra. What is imported is
# compiled then: to compile all of it takes a third of the time that an installation takes.
.venv/%: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[$*]"
	touch $@

clean:
	rm -rf .venv
