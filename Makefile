# The targets are shorthand; `go build`, `go vet` and `go test -race ./...` work
# without them. `make help` tells what each does.

VERSION ?= $(shell git describe --tags --match 'v*' --dirty 2>/dev/null)
COMMIT  ?= $(shell git describe --always --exclude '*' --abbrev=12 --dirty 2>/dev/null)
STAMP   := github.com/signet-mesh/signet/cmd/internal/version
BUILD   := CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X $(STAMP).release=$(VERSION) -X $(STAMP).commit=$(COMMIT)'
TOOLS    = $$(go run ./integration/fetch tools)

.PHONY: help build build-pkcs11 build-cloudkms tools demo example-istio-ca test bench soak fuzz mutants lint generate image clean

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' Makefile

build: ## build bin/signet-ca, bin/signet-agent and bin/signet
	$(BUILD) -o bin/signet-ca ./cmd/ca
	$(BUILD) -o bin/signet-agent ./cmd/agent
	$(BUILD) -o bin/signet ./cmd/signet

build-pkcs11: ## build bin/signet-ca-pkcs11, which opens PKCS#11 tokens; needs a C compiler
	$(subst CGO_ENABLED=0,CGO_ENABLED=1,$(BUILD)) -tags pkcs11 -o bin/signet-ca-pkcs11 ./cmd/ca

build-cloudkms: ## build bin/signet-ca-cloudkms, which opens keys of AWS, Google Cloud and Azure
	cd cmd/ca/cloudkms && $(BUILD) -o ../../../bin/signet-ca-cloudkms .

tools: ## fetch or build what tests and lint need, once, into the user's cache
	@go run ./integration/fetch

demo: build ## show the whole product at work on this machine, in a minute
	@ENVOY=$$(go run ./integration/fetch envoy) bin/signet demo

example-istio-ca: build ## serve Istio's certificate RPC on 127.0.0.1:15012, in the foreground
	@PATH="$(CURDIR)/bin:$$PATH" exec bash examples/istio-ca/run.sh

# These compare a great many things one after the other, or cannot be run with the race detector.
SWEEPS := TestBoxesAgreeWithEnvoy|TestDecideAgreesWithIstioAndEnvoy|TestAnAgentObtainsExactlyTheLivePodsOfItsNode|TestCrashMatrix|TestVerificationDetects|TestTheRootIsReplacedAtHalfOfItsLife|TestARotationWaitsForWhoIsMissing|TestOperatorsRotate|TestRotationCrashMatrix|TestModel|TestModelRandom|TestReplicasReplaceTheirRoot|TestTheRootsReplicaIsAway|TestReplicasUnderLostAnswers|TestAFloodOfConnectionsKeepsNobodyOut

test: tools ## run all tests, with the race detector
	@# Package integration takes longest, of which most is waiting: it goes first, and the
	@# others have the time that it leaves. What takes its time for numbers, and not for
	@# goroutines, runs a few with the race detector and all without. The detector waits
	@# for a second when a program ends, of which there are hundreds; who debugs has tables
	@# for debuggers.
	@export GORACE=atexit_sleep_ms=10 GOFLAGS="$$GOFLAGS -ldflags=-w" && \
	all=$$(go list ./...) && rest=$$(echo "$$all" | grep -v '/integration$$') && \
	go run ./integration/testrun -race -timeout 20m -parallel 4 ./integration \
		-- -race -timeout 20m -p 2 $$rest \
		-- -short -timeout 20m -p 1 ./authz ./authz/explain ./authz/extauthz \
		-- -timeout 20m -p 1 -run '^($(SWEEPS))$$' ./integration/oracle ./ca ./ca/kube ./ca/rotation ./identity/attest

bench: tools ## run all benchmarks, also those of other engines, and write bin/bench.json
	@mkdir -p bin && go run ./integration/bench -o bin/bench.json -also integration/peers ./...

soak: tools ## run what takes long: the property test on many clusters, and on this code with a check removed; an agent killed for a minute; a minute of checks under churn; ten million CheckRequests; authorities replaced under traffic for ten minutes, and killed meanwhile; each write of a rotation going wrong in every way; millions of states of a rotation; fuzz targets for ten minutes each
	go test -race -timeout 60m ./ca/kube -run TestAnAgentObtainsExactlyTheLivePodsOfItsNode -worlds 1000
	go run ./integration/mutants
	go test -race ./integration -run TestDemoHolds -demo-within 1m
	go test -race -timeout 20m ./integration -run TestAgentKilledUnderIssuance -kill-agent 1m -v
	go test -race -timeout 20m ./integration -run TestAuthorityKilledUnderIssuance -kill-ca 1m -v
	go test -race -timeout 20m ./integration -run TestNoWrongDecisionUnderChurn -churn 1m -v
	go test -timeout 60m ./authz/extauthz -run TestScanAgreesWithTheGeneratedDecoder -messages 10000000 -v
	go test -race -timeout 20m ./integration -run TestNoHandshakeFailsWhileAuthoritiesAreReplaced -rotate 10m -v
	go test -timeout 20m ./ca -run TestRotationCrashMatrix -every-fault -v
	go test -timeout 20m ./ca -run TestReplicasUnderLostAnswersOfEtcd -every-commit -v
	go test -race -timeout 20m ./integration -run TestMigrationsAreKilled -kill-every-step -v
	go test -timeout 60m ./ca/rotation -states 1000000 -walks 10000 -v
	go test -timeout 60m ./authz/explain -denied 20000 -asked 10000000 -v
	go test -timeout 20m ./ca/caclient -run TestStorm -storm 10000 -v
	go run ./integration/fuzz -time 10m ./...

FUZZTIME ?= 10s
FUZZ     ?= ./...
fuzz: ## run the fuzz targets of $FUZZ (all), each for $FUZZTIME (10s)
	@go run ./integration/fuzz -time $(FUZZTIME) $(FUZZ)

mutants: ## change the decision path of package authz and the transitions of ca/rotation in one place at a time; their tests must notice
	@go run ./integration/mutate
	@go run ./integration/mutate -package ca/rotation

lint: ## check format, code, modules, wire format, structure and links
	@bash integration/lint.sh

generate: ## regenerate the wire format's Go
	@tools=$(TOOLS) && PATH="$$tools:$$PATH" buf generate

image: ## record the wire format that later changes must be compatible with; at a release only
	@tools=$(TOOLS) && $$tools/buf build --exclude-source-info -o ca/capb/released.binpb

clean: ## remove what make made; the cache of tools stays
	rm -rf bin
