# make quickstart   set everything up, tokenize real text, train on it with two ranks through Spark, sample from it
# make test         set everything up, check style, types and import walls, run all tests
# make chaos        train while processes are killed at random, and compare with the undisturbed run; a quarter of an hour
# make docs         the documentation as a site

VENV   := .venv
BIN    := $(VENV)/bin
PYTHON ?= python3
DATA   := data/quickstart
RUN    := runs/quickstart
# spark-submit takes Python from the PATH; a laptop's host name often resolves to an address it cannot bind.
SUBMIT := PATH="$(CURDIR)/$(BIN):$$PATH" PYSPARK_PYTHON=python spark-submit --properties-file conf/spark-defaults.conf --master local[2]
# More settings for the quickstart's training: make quickstart TRAIN_ARGS="--train.steps 20"
TRAIN_ARGS ?=

.PHONY: quickstart test chaos chaos-short lint commands lm-eval notebooks docs bench clean java

quickstart: java $(VENV)/.installed
	$(SUBMIT) jobs/tokenize.py conf/tokenize.toml
	$(SUBMIT) jobs/train.py conf/quickstart.toml --run.dir $(RUN) $(TRAIN_ARGS)
	$(BIN)/python jobs/generate.py --model $(RUN) --prompt "def test_" --temperature 0.7 --seed 1

# Two at a time, a file each: half of them wait for processes that they have started or killed.
test: java lint
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/test_chaos.py

# Four kills, minutes: the short form of make chaos.
chaos-short: java $(VENV)/.installed
	$(BIN)/pytest tests/test_chaos.py

# Another run: make chaos SEED=2 KILLS=40
SEED  ?= 1
KILLS ?= 24
CHAOS ?= runs/chaos-$(SEED)

chaos: java $(VENV)/.installed
	$(BIN)/python -m tests.chaos --seed $(SEED) --kills $(KILLS) --directory $(CHAOS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The commands of README and docs that can run on one machine, on a small model.
commands: java $(VENV)/.installed
	$(BIN)/python -m tests.commands

# EleutherAI's harness, in an environment of its own: it opens a run's model as it is, and finds that model's loss.
lm-eval: java $(VENV)/lm-eval/.installed
	SPARKTRAIN_LM_EVAL="$(CURDIR)/$(VENV)/lm-eval/bin/lm_eval" $(BIN)/pytest tests/test_lm_eval.py

# Minutes: notebooks with their own settings, as a user runs them; CI runs them small (tests/test_notebooks.py).
notebooks: java $(VENV)/.installed
	$(BIN)/python -m tests.notebooks

# To site/, from docs/ and docstrings; a warning is an error.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: java $(VENV)/.installed
	$(BIN)/python benchmarks/loop.py
	$(BIN)/python benchmarks/launch.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/distro.py
	$(BIN)/python benchmarks/diloco.py
	$(BIN)/python benchmarks/order.py
	$(BIN)/python benchmarks/pack.py
	$(BIN)/python benchmarks/planner.py
	$(BIN)/python benchmarks/reader.py
	$(BIN)/python benchmarks/waiting.py

# Before anything else: pyspark without Java fails late and says JAVA_GATEWAY_EXITED.
java:
	@java="$${JAVA_HOME:+$$JAVA_HOME/bin/}java"; \
	version=$$("$$java" -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -n 1); \
	if [ "$${version:-0}" -lt 17 ]; then \
	  echo "error: Spark needs Java 17 or newer, found $${version:-none}: install it (Debian, Ubuntu: apt-get install openjdk-17-jre-headless; macOS: brew install openjdk@17) and set JAVA_HOME to it" >&2; \
	  exit 2; \
	fi

$(VENV)/.installed: setup.cfg setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/lm-eval/.installed: $(VENV)/.installed
	$(PYTHON) -m venv $(VENV)/lm-eval
	$(VENV)/lm-eval/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt lm-eval torch transformers accelerate
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info data runs site
