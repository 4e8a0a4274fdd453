package source

import (
	"context"
	"net/http"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/authz"
)

// Limits, for tests at the limits.
const (
	MaxFiles       = maxFiles
	MaxBytes       = maxBytes
	MaxFileBytes   = maxFileBytes
	Gather         = gather
	GatherRemovals = gatherRemovals
)

// LoseEvents makes f believe that the kernel dropped events after those that it
// can read now.
func LoseEvents(f *Folder) error {
	if err := f.watch.drain(); err != nil {
		return err
	}
	f.watch.mu.Lock()
	defer f.watch.mu.Unlock()
	f.watch.noteOne(-1, unix.IN_Q_OVERFLOW, "", time.Now())
	return nil
}

// Between sets what f calls in each reading, after the files were read and before
// they count. It must be called before Run.
func Between(f *Folder, call func()) { f.between = call }

// Reread reads the folder at once. f must not run. It reports whether the folder
// changed so that it has to be read again.
func Reread(f *Folder) (again bool) {
	err := f.read()
	if err == errChanging {
		return true
	}
	f.publish(err)
	return false
}

// SavedForTest is what a Cluster with one good AuthorizationPolicy shop/a exports.
func SavedForTest(tb interface{ Fatal(...any) }, text string) []byte {
	body, err := encodeSaved(map[string]clusterDoc{"AuthorizationPolicy shop/a": {text: []byte(text), good: []byte(text)}})
	if err != nil {
		tb.Fatal(err)
	}
	return withHeader(time.Now(), body)
}

// FetchKeys fetches the keys that a rule names, at once.
func FetchKeys(ctx context.Context, k *KeySets, rule *authz.TokenRule) error {
	_, _, err := k.fetch(ctx, originOf(rule), ruleTimeout(rule))
	return err
}

// SetTransport has k fetch by other means than the network. It must be called before
// Run.
func SetTransport(k *KeySets, t http.RoundTripper) { k.client.Transport = t }

// Limits of KeySets.
const (
	MaxKeyBytes         = maxKeyBytes
	MaxKeySets          = maxKeySets
	MaxNamespaceKeySets = maxNamespaceKeySets
	UnknownKeyRefresh   = unknownKeyRefresh
	KeyLinger           = keyLinger
	MaxKeyRetry         = maxKeyRetry
	MaxKeyTimeout       = maxKeyTimeout
)

// Permitted says why keys must not be fetched from an address, or nothing.
var Permitted = permitted

// Feed is how requests for one type go.
type Feed struct{ f *feed }

func NewFeed() Feed { return Feed{&feed{resource: "things", wake: func() {}}} }

// Tried notes how a request went.
func (f Feed) Tried(ctx context.Context, err error) { f.f.tried(ctx, "listing", err) }

func (f Feed) Contact() Contact { return f.f.contact() }

// KeySet is a set of keys that is due.
type KeySet struct{ s *keySet }

func DueKeySet(namespace string, failures int) KeySet {
	return KeySet{&keySet{namespaces: []string{namespace}, failures: failures}}
}

// KeySlots are the fetches that go on.
type KeySlots struct{ s keySlots }

// Next are those sets that may be fetched now.
func (k *KeySlots) Next(due ...KeySet) (begun []KeySet) {
	var sets []*keySet
	for _, d := range due {
		sets = append(sets, d.s)
	}
	for s := range k.s.next(sets) {
		begun = append(begun, KeySet{s})
	}
	return begun
}

// End ends the fetch of a set.
func (k *KeySlots) End(set KeySet) { k.s.end(set.s, set.s.namespaces[0]) }
