# Every target does all its own set-up, in a virtual environment under $(VENV).
VENV ?= .venv
KILLS ?= 40
FUZZ_SECONDS ?= 60
PYTHON ?= python3

RUN = $(VENV)/bin
INSTALL = $(RUN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

PEERS = benchmarks/speed/.environments
BENCHED = $(VENV)/.demo-installed $(PEERS)/trl-1.16/.installed $(PEERS)/trl-1.9/.installed
BENCHMARK = $(RUN)/python benchmarks/speed/run.py

.PHONY: demo test lint docs docs-serve browser torture fuzz bench bench-quick bench-curves clean

demo: $(VENV)/.demo-installed
	$(RUN)/trivium demo

test: $(VENV)/.test-installed
	$(RUN)/python -m pytest

lint: $(VENV)/.test-installed
	$(RUN)/ruff check
	$(RUN)/ruff format --check
	$(RUN)/pyright --pythonpath $(RUN)/python

# The docs site, in site/: open site/index.html. Broken links and missing pages are errors.
docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict

docs-serve: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs serve

# Chromium for the tests of pages, where it can be installed; without it those tests are skipped.
browser:
	@if command -v chromium chromium-browser google-chrome >/dev/null; then \
	  echo "browser: found"; \
	elif ! command -v apt-get >/dev/null; then \
	  echo "browser: no apt-get, so tests of pages are skipped"; \
	elif [ "$$(id -u)" = 0 ]; then \
	  apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y chromium >/dev/null \
	    || echo "browser: apt-get failed, so tests of pages are skipped"; \
	elif sudo -n true 2>/dev/null; then \
	  sudo apt-get -qq update && sudo apt-get -qq install -y chromium >/dev/null \
	    || echo "browser: apt-get failed, so tests of pages are skipped"; \
	else \
	  echo "browser: not root, so tests of pages are skipped"; \
	fi

torture: $(VENV)/.test-installed
	$(RUN)/python benchmarks/torture.py --kills $(KILLS)

fuzz: $(VENV)/.fuzz-installed
	for target in loaders files sources parquet configuration; do \
	  PYTHONPATH=tests $(RUN)/python -m fuzz.run $$target --seconds $(FUZZ_SECONDS) || exit 1; \
	done

# Trivium beside TRL, on one core; BENCH takes further options, such as --core 0 or --only 'dpo-*'.
bench: $(BENCHED)
	$(BENCHMARK) --resume $(BENCH)
	$(RUN)/python benchmarks/speed/curves.py

bench-quick: $(BENCHED)
	$(BENCHMARK) --quick $(BENCH)

bench-curves: $(BENCHED)
	$(BENCHMARK) --resume --only 'curve-*' $(BENCH)
	$(RUN)/python benchmarks/speed/curves.py

clean:
	rm -rf $(PEERS) benchmarks/speed/.worlds
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis dist fuzzing site
	find trivium tests -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo-installed: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) --editable .
	touch $@

$(VENV)/.test-installed: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) --editable '.[test]'
	touch $@ $(VENV)/.demo-installed

$(VENV)/.docs-installed: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) --editable '.[docs]'
	touch $@ $(VENV)/.demo-installed

$(VENV)/.fuzz-installed: $(VENV)/.test-installed
	$(INSTALL) --editable '.[test,fuzz]'
	touch $@

$(PEERS)/%/.installed: benchmarks/speed/%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check --requirement $<
	touch $@
