# The commands of this repository. The first use of any makes its own environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
# Every worker is a process that imports torch: 2.0 s of processor time from byte code, 4.2 s without.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow fuzz lint bench constraints docs coverage clean

demo: $(INSTALLED)  ## a finished study on the embedded digits, its table, and its page report.html
	$(BIN)/study launch quick
	$(BIN)/study report quick --html report.html > /dev/null

test: $(INSTALLED)  ## the tests; with STUDY_TEST_IMAGES=FOLDER also on real images
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(INSTALLED)  ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow --timeout=1800

fuzz: $(INSTALLED)  ## random input for a bounded time, with its seeds; FUZZ_SECONDS=300 and FUZZ_SEED=… change them
	$(BIN)/python -m pytest -m fuzz -s

lint: $(INSTALLED)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[test,dev]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# uv, because a resolver that downloads in parallel makes torch's gigabytes a matter of seconds.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[test]'
	touch $@

bench: $(INSTALLED)  ## what docs/measurements/performance.md shows, on this machine; half an hour; STUDY_DATA_ROOT=FOLDER: real images
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.overhead

constraints: $(INSTALLED)  ## pin everything anew
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade \
		--no-annotate --no-header --no-emit-index-url --quiet --output-file constraints.txt
	$(BIN)/uv --version | awk '{print "uv==" $$2}' >> constraints.txt

docs: $(INSTALLED)  ## the site of docs/ in build/site, strict: a link that leads nowhere is an error; no network
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

coverage: $(INSTALLED)  ## which lines the tests run, those of worker processes included
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[test,dev]'
	mkdir -p build/coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
