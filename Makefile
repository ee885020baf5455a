# `make run` and `make test` need Python 3.11 to 3.14 and nothing else; the rest is installed into .venv by the lock files.
# Settings come from the environment or stand behind the target: make run PORT=8001 DATA_DIR=/srv/fewshot

FOUND := $(foreach name,python3 python python3.14 python3.13 python3.12 python3.11,$(shell command -v $(name) 2>/dev/null))
PYTHON ?= $(firstword $(FOUND))
VENV := .venv/bin
BOOTSTRAP := $(if $(PYTHON),$(PYTHON) bootstrap.py,echo "Python 3.11 to 3.14 is needed, and there is none on PATH." >&2; false)
RUN_ENV := $(BOOTSTRAP) run
DEV_ENV := $(BOOTSTRAP) dev
# The browser journeys use this Chromium; without one they are skipped, or with REQUIRE_BROWSER=1 they fail.
ifndef CHROMIUM
CHROMIUM := $(firstword $(foreach name,chromium chromium-browser google-chrome google-chrome-stable,$(shell command -v $(name) 2>/dev/null)) $(wildcard $(HOME)/.cache/ms-playwright/chromium-*/chrome-linux*/chrome))
endif
export CHROMIUM

# What reads the settings without a studio that runs: type checks, missing migrations.
STANDALONE := SECRET_KEY=only-for-checks DATA_DIR=build/check DJANGO_SETTINGS_MODULE=webapp.settings

COMPILE := uv pip compile --quiet --universal --generate-hashes --python-version 3.11 pyproject.toml

NO_BROWSER := echo "*** NO CHROMIUM: THE BROWSER JOURNEYS ARE SKIPPED. Install one (Debian: apt install chromium), or say where it is: make test CHROMIUM=/path ***"

.PHONY: help run manage test test-fast test-reliability bench check types fmt lock clean

help:
	@echo "make run               set up what is missing, start everything, print the address (PORT, HOST, DATA_DIR)"
	@echo "make manage ARGS=…     manage.py with the settings of make run (ARGS=createsuperuser)"
	@echo "make test              every test, browser journeys included; test-fast leaves those out"
	@echo "make test-reliability  break things on purpose"
	@echo "make bench             figures against budgets"
	@echo "make check             formatting, lint, types, import arrows, missing migrations; make fmt mends the first two"
	@echo "make lock              resolve requirements/*.txt and package-lock.json again"
	@echo "make clean             remove what can be built again (not .venv, not data)"

run:
	@$(RUN_ENV)
	@exec $(VENV)/python -m webapp.run

manage:
	@$(RUN_ENV)
	@exec $(VENV)/python -m webapp.run manage $(ARGS)

test:
	@$(DEV_ENV)
	@$(if $(CHROMIUM),echo "Browser journeys in $(CHROMIUM)",$(NO_BROWSER))
	$(VENV)/python -m pytest -m "not reliability and not bench" $(ARGS)
	@$(if $(CHROMIUM),,$(NO_BROWSER))

test-fast:
	@$(DEV_ENV)
	$(VENV)/python -m pytest -m "not e2e and not reliability and not bench" $(ARGS)

test-reliability:
	@$(DEV_ENV)
	$(VENV)/python -m pytest -m reliability -s $(ARGS)

bench:
	@$(DEV_ENV)
	$(VENV)/python -m tests.bench $(ARGS)

check:
	@$(DEV_ENV)
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/lint-imports
	@$(MAKE) --no-print-directory types
	$(STANDALONE) $(VENV)/python manage.py makemigrations --check --dry-run

types:
	@mkdir -p build/check
	$(STANDALONE) $(VENV)/mypy bootstrap.py webapp worker fewshot_engine

fmt:
	@$(DEV_ENV)
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .

# dev first: the others take its versions, so that one environment serves all of them.
lock:
	@$(DEV_ENV)
	$(VENV)/$(COMPILE) --extra web --extra engine --extra dev -o requirements/dev.txt
	$(VENV)/$(COMPILE) --extra web --extra engine -c requirements/dev.txt -o requirements/run.txt
	$(VENV)/$(COMPILE) --extra web -c requirements/dev.txt -o requirements/web.txt
	$(VENV)/$(COMPILE) --extra engine -c requirements/dev.txt -o requirements/engine.txt
	$(VENV)/$(COMPILE) --extra uv -o requirements/uv.txt
	$(VENV)/$(COMPILE) --extra node -o requirements/node.txt
	npm install --package-lock-only

clean:
	rm -rf build node_modules static/vendor staticfiles test-results .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find bootstrap.py webapp worker fewshot_engine tests -name __pycache__ -type d -prune -exec rm -rf {} +
