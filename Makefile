# The commands of this repository. The first use of any makes its own environment in .venv; `make demo` installs the
# package alone, `make test` what the tests need besides (Ray, a PostgreSQL, playwright).
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TESTABLE := .venv/.testable
TRAINING_TESTS := tests/unit/test_training.py tests/unit/test_cuda_graphs.py tests/unit/test_policies.py tests/integration/test_study.py
RANDOM_TESTS := tests/integration/test_import.py tests/integration/test_trial_checkpoint.py tests/unit/test_checkpoint_state.py
# Every worker is a process that imports torch: 2.0 s of processor time from byte code, 4.2 s without.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-isa test-slow fuzz lint bench constraints docs coverage clean

demo: $(INSTALLED)  ## a finished study on the embedded digits, its table, and its page report.html
	$(BIN)/study launch quick
	$(BIN)/study report quick --html report.html > /dev/null

test: $(TESTABLE)  ## the tests; with STUDY_TEST_IMAGES=FOLDER also on real images
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-isa: $(TESTABLE)  ## the tests that train, as on a processor without AVX and bf16: other bits, the same outcome
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(BIN)/python -m pytest -n 2 --dist loadfile $(TRAINING_TESTS)

test-slow: $(TESTABLE)  ## long tests, and those of which a faster one verifies the substance
	$(BIN)/python -m pytest -m slow --timeout=1800

fuzz: $(TESTABLE)  ## random input for 4 minutes, with its seeds; FUZZ_SECONDS=… (of each parser) and FUZZ_SEED=… change them
	$(BIN)/python -m pytest -m fuzz -s
	FUZZ_EXAMPLES=100 $(BIN)/python -m pytest $(RANDOM_TESTS) -k 'any_value or mutated or damage'

lint: $(TESTABLE)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[test,dev]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# uv, because a resolver that downloads in parallel makes torch's gigabytes a matter of seconds.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e .
	touch $@

$(TESTABLE): $(INSTALLED)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[test]'
	touch $@

bench: $(TESTABLE)  ## what docs/measurements/performance.md shows, on this machine; half an hour
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

coverage: $(TESTABLE)  ## which lines the tests run, those of worker processes included
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[test,dev]'
	mkdir -p build/coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
