# SPDX-License-Identifier: Apache-2.0

GO      ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)

# The compiler of the committed BPF objects.
CLANG       := clang-19
CLANG_MAJOR := 19

# What the tests need beyond Go, as Debian 12 names it.
PACKAGES := clang-19 llvm-19 clang-format-19 libbpf-dev linux-libc-dev \
	iproute2 ethtool util-linux procps curl redis-server redis-tools qemu-system-x86 qemu-utils qemu-guest-agent \
	dnsmasq-base iputils-ping etcd-server dropbear-bin openssh-client \
	nginx-light libnginx-mod-http-headers-more-filter wrk nghttp2-client \
	memcached libmemcached-tools nsd dnsperf sockperf xz-utils \
	prometheus bpftool \
	resource-agents libxml2-utils shellcheck \
	lintian man-db rpm systemd \
	gcc libc6-dev

# What the soak needs besides: of a Debian that is a guest, of two hosts that are a cluster, and of domains.
SOAK_PACKAGES := mmdebstrap postgresql-client e2fsprogs pacemaker pacemaker-cli-utils corosync \
	libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients

# Committed output of bpf2go, and the C it comes from.
GENERATED = $(shell git ls-files '*_bpfel.go' '*_bpfel.o')
C_FILES   = $(shell git ls-files '*.c' '*.h')

# Packages with goroutines of their own that need no guest and no device.
RACED := ./control ./control/api ./control/arbiter ./control/guestagent ./control/journal ./control/peerlink ./control/program ./control/qmp ./control/state

# Nothing but the race detector needs a C compiler, so that the tests build what is
# released.
export CGO_ENABLED := 0

.PHONY: build
build: ## static bin/lockstep, with Go alone
	$(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/lockstep ./cmd/lockstep

.PHONY: deb rpm
deb rpm: ## the Debian or RPM package, in bin, with Go alone
	@mkdir -p bin
	@GO=$(GO) packaging/build $@ bin $(VERSION)

.PHONY: deps
deps: ## install what the tests and their guests need (Debian, as root)
	@.ci/deps $(PACKAGES)
	@.ci/guest bin/guest
	@.ci/selftests bin/selftests

.PHONY: generate
generate: ## rebuild the BPF objects and their Go views
	@$(CLANG) --version | grep -q 'clang version $(CLANG_MAJOR)\.' || \
		{ echo '$(CLANG) is missing or not version $(CLANG_MAJOR); run make deps' >&2; exit 1; }
	$(GO) generate ./...

.PHONY: check-generated
check-generated: ## fail when the committed object is not what its sources give
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && \
	tar -c --exclude=./.git --exclude=./bin . | tar -x -C "$$tmp" && \
	$(MAKE) --no-print-directory -C "$$tmp" generate && \
	for f in $(GENERATED); do \
		cmp "$$tmp/$$f" $$f || { echo 'the committed object was not built from these sources: run make generate and commit' >&2; exit 1; }; \
	done

.PHONY: lint
lint: ## gofmt, vet, staticcheck, other analyzers, known vulnerabilities, clang-format, the repository's own checks
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { echo "gofmt: $$unformatted" >&2; exit 1; }
	$(GO) vet ./...
	$(GO) tool staticcheck ./...
	$(GO) tool nilness ./...
	$(GO) tool go-errorlint ./...
	@.ci/vulncheck $(GO)
	clang-format-19 --dry-run -Werror --style=file:bpf/.clang-format $(C_FILES)
	$(GO) test -count=1 .

# Two cores are all that is counted on: real pairs and figures run alone, and the other packages
# two at a time, of which control/qemu is the slowest.
.PHONY: test
test: deps lint check-generated build race ## everything CI checks
	$(GO) test -count=1 -p 2 -timeout 40m ./control/qemu $$($(GO) list ./... | grep -v -e '/control/qemu$$' -e '/bench$$' -e '/e2e$$')
	$(GO) test -count=1 -p 1 -timeout 40m ./bench ./cmd/lockstep/e2e

.PHONY: race
race: ## the race detector over what needs neither guest nor device
	CGO_ENABLED=1 $(GO) test -race -count=1 -p 2 -timeout 20m $(RACED)

.PHONY: demo
demo: deps build ## as root: a real pair, a client that does not notice how its hosts die
	@bin/lockstep demo $(DEMOFLAGS)

# Figures, not a test: it fails only when something does not work. Quietest on an
# idle machine.
.PHONY: bench
bench: build ## as root, half an hour: against QEMU's proxy and mirroring alone, and real pairs; bin/bench.html has charts
	@.ci/guest bin/guest || echo 'without a guest there is no part C' >&2
	@bin/lockstep bench --json bin/bench.json --html bin/bench.html $(BENCHFLAGS)

.PHONY: bench-smoke
bench-smoke: build ## as root, a minute: latency, throughput and CPU against mirroring alone
	@bin/lockstep bench --parts A --qemu none --rounds 3

.PHONY: soak-deps
soak-deps: deps ## install what only the soak uses, and build a Debian image for its guest and bare Debians
	@.ci/deps $(SOAK_PACKAGES)
	@.ci/debian bin/debian
	@.ci/root bookworm bin/roots/bookworm
	@.ci/root trixie bin/roots/trixie

.PHONY: soak
soak: soak-deps ## as root, two hours: 100 000 connections held open, real pairs through many failovers, a Debian guest, clients' histories, each QEMU
	@.ci/soak

.PHONY: clean
clean:
	rm -rf bin

.PHONY: help
help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile
