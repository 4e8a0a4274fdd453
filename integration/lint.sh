#!/usr/bin/env bash
# Everything that `make lint` checks. All checks run, also after one has failed;
# each that fails says what is wrong. Run it at the root of the repository.
set -uo pipefail

tools=$(go run ./integration/fetch tools) || exit 1
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT
failed=()

# check NAME COMMAND…: the command succeeds.
check() {
	local name=$1
	shift
	if "$@" >"$tmp/out" 2>&1; then
		echo "ok    $name"
	else
		echo "FAIL  $name"
		sed 's/^/      /' "$tmp/out"
		failed+=("$name")
	fi
}

formatted() {
	local files
	files=$(gofmt -l .) || return 1
	[ -z "$files" ] || { echo "run gofmt -w on:" "$files"; return 1; }
}

generated() {
	PATH="$tools:$PATH" buf generate -o "$tmp/generated" || return 1
	local file status=0
	for file in "$tmp"/generated/ca/capb/*.go; do
		diff -u "ca/capb/${file##*/}" "$file" >"$tmp/diff" || { head -30 "$tmp/diff"; status=1; }
	done
	# A file whose source went away stays in the tree until somebody removes it.
	for file in ca/capb/*.pb.go; do
		[ -e "$tmp/generated/$file" ] || { echo "$file is not generated any more"; status=1; }
	done
	[ $status = 0 ] || echo "run make generate"
	return $status
}

check 'gofmt' formatted
check 'go vet' go vet ./...
check 'staticcheck' "$tools/staticcheck" ./...
check 'go vet (pkcs11)' go vet -tags pkcs11 ./cmd/ca
check 'go mod tidy' go mod tidy -diff
for module in tools etcd kubernetes istio stepca; do
	check "go mod tidy ($module)" go -C integration/$module mod tidy -diff
done
check 'go mod tidy (cloudkms)' go -C cmd/ca/cloudkms mod tidy -diff
check 'go vet (cloudkms)' go -C cmd/ca/cloudkms vet .
check 'generated code' generated
check 'buf lint' "$tools/buf" lint
# Against the wire format of the last release; `make image` records a new one.
check 'buf breaking' "$tools/buf" breaking --against ca/capb/released.binpb
check 'structure and links' go test -count=1 -run '^(TestImportTable|TestProgramsStaySmall|TestDocLinks)$' ./integration

if [ ${#failed[@]} -gt 0 ]; then
	printf 'lint: failed:'
	printf ' %s;' "${failed[@]}"
	echo
	exit 1
fi
