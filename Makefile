# Each target does all of its own set-up; nothing but cargo and pip has to be there. `make help` lists them.

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-release bench gpu-check gpu-pack lint setup

# A name that `lowkey pull` knows, a directory, or a .gguf file.
MODEL ?= smollm2-135m-instruct
METHOD ?= lowkey
TIMES ?= 8
DEPTHS ?= 0,512,2048
# `make demo DEVICE=cpu` runs on the processor and wants no driver.
DEVICE ?=

on := $(if $(DEVICE),--device '$(DEVICE)')
target := $(or $(CARGO_TARGET_DIR),target)
lowkey := $(target)/release/lowkey
driver := $(if $(filter cpu,$(DEVICE)),build,)

help:
	@echo 'make demo    fetch a small chat model, make its key/value cache eight times smaller, compare, chat'
	@echo 'make test    lint, then every test, on the GPU or on a software Vulkan driver'
	@echo 'make test-release  the tests of the device and of its kernels once more, as they are shipped: optimised, without Rust'"'"'s own checks'
	@echo 'make bench   speed by depth, dense and compressed'
	@echo 'make gpu-check  kernels tested and timed on this GPU, and whole models, in eight minutes; make gpu-pack only builds what it needs'
	@echo 'make lint    formatting, clippy and documentation, warnings denied'
	@echo 'make setup   install a Vulkan driver if none is usable (Debian, Ubuntu)'
	@echo
	@echo 'demo and bench take MODEL=$(MODEL) METHOD=$(METHOD) TIMES=$(TIMES) DEVICE=cpu or a part of a GPU'"'"'s name, bench DEPTHS=$(DEPTHS)'

setup:
	@sh assets/setup.sh $(driver)

# Methods whose size is that of their numbers take no budget, and all but one of them no text.
budget := $(if $(filter dense kivi kvarn oscar,$(METHOD)),,--times $(TIMES))
calibration := $(if $(filter dense kivi kvarn,$(METHOD)),,--calibration-tokens 8192)

# The model, and an adapter file for it: beside it in the cache directory where it was fetched, else below the build's. It is made again where it no longer opens,
# or where the model's path or the program is another one.
prepare = \
	set -eu; \
	cargo build --release --features hub --bin lowkey; \
	model="$(MODEL)"; \
	if [ -e "$$model" ]; then \
		model=$$(cd "$$(dirname "$$model")" && pwd)/$$(basename "$$model"); \
		mkdir -p "$(target)/demo"; small="$(target)/demo/$$(basename "$$model" .gguf)"; \
	else \
		model=$$($(lowkey) pull "$$model"); small=$${model%.gguf}; \
	fi; \
	small="$$small-$(METHOD)-$(TIMES)-$$({ echo "$$model"; cat "$(lowkey)"; } | cksum | cut -d ' ' -f 1).lowkey"; \
	if [ -e "$$small" ] && ! $(lowkey) inspect "$$model" --adapter "$$small" >/dev/null 2>&1; then rm "$$small"; fi; \
	[ -e "$$small" ] || $(lowkey) compress "$$model" -o "$$small" --method $(METHOD) $(budget) $(calibration)

demo: setup
	@$(prepare); \
	$(lowkey) eval "$$small" --against "$(MODEL)" --text assets/evaluation.txt $(on); \
	$(lowkey) bench "$(MODEL)" "$$small" --depth 0 --prefill 64 --rounds 2 $(on); \
	if [ -t 0 ] && [ -t 1 ]; then \
		exec $(lowkey) chat "$(MODEL)" --adapter "$$small" $(on); \
	else \
		$(lowkey) generate "$(MODEL)" --adapter "$$small" -p 'What is the capital of France?' --max-tokens 64 $(on); \
	fi

bench: setup
	@$(prepare); \
	$(lowkey) bench "$(MODEL)" "$$small" --depth "$(DEPTHS)" $(on)

# What travels to a machine that has a GPU and no compiler: carry $(target)/gpu-check and assets there, and run gpu-check.
gpu-pack:
	@sh assets/setup.sh build
	@set -eu -o pipefail; \
	cargo build --release --features hub --bin lowkey; \
	tests=$$(cargo test --no-run --all-features --lib 2>&1 | tee /dev/stderr | sed -n 's/^ *Executable .*(\(.*\))$$/\1/p'); \
	mkdir -p $(target)/gpu-check; \
	cp $(target)/release/lowkey $(target)/gpu-check/lowkey; cp "$$tests" $(target)/gpu-check/kernel-tests; \
	strip $(target)/gpu-check/lowkey $(target)/gpu-check/kernel-tests; \
	git describe --always --dirty >$(target)/gpu-check/commit

RESULTS ?= $(target)/gpu-check/results-$(shell date -u +%Y-%m-%d-%H%M%S)

gpu-check:
	@set -eu; if command -v cargo >/dev/null; then $(MAKE) --no-print-directory setup gpu-pack; fi; \
	sh assets/gpu-check.sh $(target)/gpu-check "$(RESULTS)"

lint:
	@sh assets/setup.sh build
	@cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 || rustup component add rustfmt clippy
	cargo fmt --check
	cargo clippy --all-features --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --no-deps --all-features

# No skipping here: a test that needs a GPU or a real model fails where it has none.
test: lint setup
	@cargo build --all-features --bin lowkey
	@set -eu -o pipefail; \
	model=$$($(target)/debug/lowkey pull smollm2-135m-instruct); \
	LOWKEY_TEST_MODEL="$$model" cargo test --all-features --no-fail-fast 2>&1 | tee $(target)/test.log; \
	awk '/^test result:/ { suites += 1; passed += $$4; failed += $$6; ignored += $$8 } \
		END { print passed " passed, " failed + 0 " failed, " ignored + 0 " ignored, in " suites " suites" }' $(target)/test.log

# The kernels and the device as they are shipped. It builds everything a second time.
test-release: setup
	@set -o pipefail; cargo test --release --all-features --lib -- gpu:: kernels:: 2>&1 | tee $(target)/test-release.log
