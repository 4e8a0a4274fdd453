package ca_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/keys"
	"github.com/signet-mesh/signet/ca/replica"
	"github.com/signet-mesh/signet/storage"

	"github.com/prometheus/client_golang/prometheus"
	"go.step.sm/crypto/kms/apiv1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// keyDevice is a device with keys that several replicas reach.
type keyDevice struct {
	mu   sync.Mutex
	keys map[string]*ecdsa.PrivateKey // guarded by mu
}

func newDevice() *keyDevice { return &keyDevice{keys: map[string]*ecdsa.PrivateKey{}} }

// configure is for newWorld.
func (d *keyDevice) configure(c *ca.Config) {
	c.Keys.Managers = map[string]keys.Opener{"pkcs11": func(context.Context, apiv1.Options) (apiv1.KeyManager, error) { return d, nil }}
	c.Keys.Made = map[string]string{keys.Root: "pkcs11:token=shared"}
}

func (d *keyDevice) CreateKey(r *apiv1.CreateKeyRequest) (*apiv1.CreateKeyResponse, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.keys[r.Name] = key
	return &apiv1.CreateKeyResponse{Name: r.Name, PublicKey: key.Public()}, nil
}

func (d *keyDevice) CreateSigner(r *apiv1.CreateSignerRequest) (crypto.Signer, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if key, ok := d.keys[r.SigningKey]; ok {
		return key, nil
	}
	return nil, errors.New("not found")
}

func (d *keyDevice) GetPublicKey(*apiv1.GetPublicKeyRequest) (crypto.PublicKey, error) {
	return nil, errors.New("not implemented")
}

func (d *keyDevice) DeleteKey(name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.keys, name)
	return nil
}

func (d *keyDevice) Close() error { return nil }

// brisk has work looked for often: every half second. On a busy machine agents have to get
// by with their SVIDs for as long as a test talks to them.
func brisk(c *ca.Config) {
	c.SVID.TTL, c.SVID.AgentTTL, c.SVID.MaxTTL, c.SVID.MinTTL = time.Minute, 10*time.Second, time.Minute, time.Second
	c.SVID.Backdate, c.Propagation, c.IntermediateTTL, c.RootTTL = 10*time.Millisecond, time.Millisecond, time.Hour, 8*time.Hour
}

// TestOneReplicaHoldsTheRoot: the others have their intermediates from it, and no step of
// a rotation is theirs.
func TestOneReplicaHoldsTheRoot(t *testing.T) {
	t.Parallel()
	shared := newShared(t)
	one := func(c *ca.Config) {
		c.SVID.AgentTTL = 40 * time.Second // so that agents' streams last
		c.Shared, c.RootReplica = shared, 1
	}
	// It is not there yet: the other one waits, and claims no instance that is its.
	opened := make(chan *world)
	go func() { opened <- newWorld(t, brisk, one) }()
	select {
	case <-opened:
		t.Fatal("a replica began without a root")
	case <-time.After(300 * time.Millisecond):
	}
	a := newWorld(t, brisk, one, func(c *ca.Config) { c.Instance = 1 })
	stopA := a.run()
	defer func() { stopA() }()
	b := <-opened
	stopB := b.run()
	defer func() { stopB() }()
	if a.ID().Path() != "/signet/ca/1" || b.ID().Path() != "/signet/ca/2" || !a.Root().Equal(b.Root()) {
		t.Fatalf("%v and %v", a.ID(), b.ID())
	}
	if rootKeys(a) != 1 || rootKeys(b) != 0 {
		t.Errorf("%d and %d keys of roots", rootKeys(a), rootKeys(b))
	}
	client, _ := b.attest(agentB)
	leaf := func() error {
		rs, err := issue(t, client, item(t, byUID(onNodeB.PodUID)))
		if err != nil || rs[0].GetX509() == nil {
			return errors.Join(err, errors.New("not issued"))
		}
		return verifies(parseChain(t, rs[0].GetX509().GetChain()), trustOf(a).Roots()...)
	}
	if err := leaf(); err != nil {
		t.Error(err)
	}
	// Another intermediate, for an operator.
	before := b.Intermediate()
	if err := b.Rotate(t.Context(), capb.RotateRequest_STEP_RENEW, "", false); err != nil || b.Intermediate().Equal(before) {
		t.Errorf("renewing: %v", err)
	}
	for _, step := range []capb.RotateRequest_Step{capb.RotateRequest_STEP_PREPARE, capb.RotateRequest_STEP_ACTIVATE, capb.RotateRequest_STEP_REVOKE, capb.RotateRequest_STEP_DISCARD} {
		_, err := adminOf(t, b).Rotate(t.Context(), &capb.RotateRequest{Step: step, Id: idOf(b.Root())})
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "ask replica 1") {
			t.Errorf("%v at the other replica: %v", step, err)
		}
	}
	// An intermediate is tainted where it is.
	inter := b.Intermediate()
	if err := a.Rotate(t.Context(), capb.RotateRequest_STEP_TAINT, idOf(inter), false); err == nil || !strings.Contains(err.Error(), "ask that one") {
		t.Errorf("tainting another's: %v", err)
	}
	if err := b.Rotate(t.Context(), capb.RotateRequest_STEP_TAINT, idOf(inter), false); err != nil || b.Intermediate().Equal(inter) {
		t.Errorf("tainting its own: %v", err)
	}
	eventually(t, "the first to tell its agents", func() bool { return trustOf(a).Taints(inter) || len(first(trustOf(a).Tainted())) == 1 })

	// The root is replaced when the agents of both have the next one.
	root := a.Root()
	clientA, _ := a.attest(agentA)
	clientB, _ := b.attest(agentB)
	onA, onB := watchTrust(t, clientA), watchTrust(t, clientB)
	if err := a.Rotate(t.Context(), capb.RotateRequest_STEP_PREPARE, "", false); err != nil {
		t.Fatal(err)
	}
	seq := trustOf(a).Sequence()
	eventually(t, "both agents to be told", func() bool { return onA.sequence() >= seq && onB.sequence() >= seq })
	onA.acknowledge(seq)
	eventually(t, "node-b alone to be waited for", func() bool {
		err := a.Rotate(t.Context(), capb.RotateRequest_STEP_ACTIVATE, "", false)
		return err != nil && strings.Contains(err.Error(), "node-b") && !strings.Contains(err.Error(), "node-a")
	})
	onB.acknowledge(seq)
	eventually(t, "the next root to be used by both", func() bool {
		under := func(w *world) bool { return w.Intermediate().CheckSignatureFrom(a.Root()) == nil }
		return !a.Root().Equal(root) && a.Root().Equal(b.Root()) && under(a) && under(b)
	})
	client, _ = b.attest(agentB)
	if err := leaf(); err != nil {
		t.Error(err)
	}
	for _, w := range []*world{a, b} {
		intact(t, w)
	}
}

// TestAReplicaThatWasDownWhenARootWasRevoked starts again, whoever has the root's key: its
// intermediate is good for long yet, but its root is not trusted any more, so that it is as
// good as none.
func TestAReplicaThatWasDownWhenARootWasRevoked(t *testing.T) {
	t.Parallel()
	for name, keep := range map[string]func(*ca.Config){
		"the root is with another replica": func(c *ca.Config) { c.RootReplica = 1 },
		"the root is in a device of all":   newDevice().configure,
	} {
		for lists, withLists := range map[string]func(*ca.Config){"": func(*ca.Config) {}, ", and there are lists": withCRL} {
			t.Run(name+lists, func(t *testing.T) {
				t.Parallel()
				shared := newShared(t)
				edit := func(c *ca.Config) { c.Shared = shared; keep(c); withLists(c) }
				a := newWorld(t, brisk, edit, func(c *ca.Config) { c.Instance = 1 })
				stopA := a.run()
				b := newWorld(t, brisk, edit)
				stopA() // what is due does not come between the steps
				root, before := a.Root(), b.Intermediate()
				b.close()
				for _, s := range []struct {
					step  capb.RotateRequest_Step
					id    string
					force bool
				}{
					{capb.RotateRequest_STEP_REPLACE, idOf(root), false},
					{capb.RotateRequest_STEP_ACTIVATE, "", true},
					{capb.RotateRequest_STEP_TAINT, idOf(root), false},
					{capb.RotateRequest_STEP_REVOKE, idOf(root), true},
				} {
					if err := a.Rotate(t.Context(), s.step, s.id, s.force); err != nil {
						t.Fatalf("%v: %v", s.step, err)
					}
				}
				roots := trustOf(a).Roots()
				if slices.ContainsFunc(roots, root.Equal) || !time.Now().Before(before.NotAfter) {
					t.Fatal("the root is trusted, or the intermediate of the other replica has ended")
				}
				defer a.run()()
				b.open()
				if b.Intermediate().Equal(before) {
					t.Error("it signs with the intermediate below the root that is revoked")
				}
				client, _ := b.attest(agentB) // its serving certificate verifies, too
				rs, err := issue(t, client, item(t, byUID(onNodeB.PodUID)))
				if err != nil || rs[0].GetX509() == nil {
					t.Fatalf("not issued: %v, %v", rs, err)
				}
				if err := verifies(parseChain(t, rs[0].GetX509().GetChain()), roots...); err != nil {
					t.Error(err)
				}
				// And it starts once more, from what is stored now.
				b.close()
				b.open()
				if err := b.Ready(); err != nil {
					t.Error(err)
				}
				for _, w := range []*world{a, b} {
					intact(t, w)
				}
			})
		}
	}
}

func first[A, B any](a A, _ B) A { return a }

// TestWhatAnswersARequest: a replica takes from the state only what it asked for.
func TestWhatAnswersARequest(t *testing.T) {
	t.Parallel()
	shared := newShared(t)
	one := func(c *ca.Config) { c.Shared, c.RootReplica = shared, 1 }
	a := newWorld(t, brisk, one, func(c *ca.Config) { c.Instance = 1 })
	stopA := a.run()
	b := newWorld(t, brisk, one)
	stopA()
	type answer struct {
		Version     int    `json:"version"`
		Request     []byte `json:"request"`
		Certificate []byte `json:"certificate"`
	}
	const key = "signed/002"
	var good answer
	if err := json.Unmarshal(must(shared.Store.Get(t.Context(), key)).Value, &good); err != nil {
		t.Fatal(err)
	}
	put := func(v any) {
		t.Helper()
		bytes, ok := v.([]byte)
		if !ok {
			bytes = must(json.Marshal(v))
		}
		must(shared.Store.Commit(t.Context(), nil, []storage.Op{{Key: key, Value: bytes}}))
	}
	// The first call asks; the second looks at what is there by then.
	before, bad := b.Intermediate(), 0
	for name, c := range map[string]struct {
		edit func(ans *answer)
		says string // empty: it is not an answer, and waited for
	}{
		"nothing that is new":         {func(*answer) {}, ""},
		"one of another key":          {func(ans *answer) { ans.Request = b.RequestHash(); ans.Certificate = a.Intermediate().Raw }, "key:"},
		"the root itself":             {func(ans *answer) { ans.Request = b.RequestHash(); ans.Certificate = a.Root().Raw }, ""},
		"no certificate":              {func(ans *answer) { ans.Request = b.RequestHash(); ans.Certificate = []byte("x") }, "what the replica with the root signed"},
		"an answer of a later format": {func(ans *answer) { ans.Version = 2 }, "version 2"},
		"an incomplete one":           {func(ans *answer) { ans.Request = nil }, "incomplete"},
	} {
		if b.RequestHash() == nil {
			if err := b.RenewIntermediate(t.Context()); err != nil {
				t.Fatal(name, err)
			}
		}
		ans := good
		c.edit(&ans)
		put(ans)
		err := b.RenewIntermediate(t.Context())
		if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
		if !b.Intermediate().Equal(before) {
			t.Fatalf("%s was taken", name)
		}
		if (b.RequestHash() == nil) != (c.says != "") {
			t.Errorf("%s: the request stays: %v", name, b.RequestHash() != nil)
		}
		if c.says == "" {
			continue
		}
		// Whoever cannot take it does not ask again at once: each request costs a signature.
		bad++
		if at, n := b.AskAgainAt(); n != bad || at.IsZero() {
			t.Errorf("%s: after %d bad answers it knows of %d", name, bad, n)
		}
		b.SetAskAgain(time.Now().Add(time.Hour))
		if err := b.RenewIntermediate(t.Context()); err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "it is asked again at") {
			t.Errorf("%s, before it is time: %v", name, err)
		}
		if b.RequestHash() != nil {
			t.Errorf("%s: it is asked again at once", name)
		}
		// When another one is due that is an alarm: the present one is good yet.
		later := time.Now().Add(45 * time.Minute)
		b.SetClock(func() time.Time { return later }, later)
		err = b.RotateDue(t.Context())
		if alarms := fmt.Sprint(b.Alarms()); err != nil || !strings.Contains(alarms, "cannot be used") || !strings.Contains(alarms, "less than a third is left") {
			t.Errorf("%s: when it is due: %v, alarms %s", name, err, alarms)
		}
		b.SetClock(time.Now, time.Now())
		b.SetAskAgain(time.Time{})
	}
	for n, want := range map[int]time.Duration{1: time.Second, 2: 2 * time.Second, 9: 256 * time.Second, 10: 5 * time.Minute, 100: 5 * time.Minute} {
		if got := ca.PauseAfter(n); got != want {
			t.Errorf("after %d bad answers nothing is asked for for %v, want %v", n, got, want)
		}
	}
	// And one that is right is taken, whatever became of what was there.
	put([]byte("not JSON"))
	stopA = a.run()
	defer func() { stopA() }()
	defer b.run()()
	eventually(t, "b to have another", func() bool {
		b.SetAskAgain(time.Time{})
		return b.RenewIntermediate(t.Context()) == nil && !b.Intermediate().Equal(before)
	})
	if _, n := b.AskAgainAt(); n != 0 {
		t.Errorf("after a good answer it remembers %d bad ones", n)
	}
	// The log of the one says for whom it signed, and so does the certificate.
	hash, named := sha256.Sum256(b.Intermediate().RawSubjectPublicKeyInfo), false
	for r := range records(a) {
		inter := r.GetKind() == capb.IssuanceRecord_KIND_INTERMEDIATE
		if r.GetForInstance() != 0 && (r.GetForInstance() != 2 || !inter) || inter && r.GetForInstance() == 0 && !bytes.Equal(r.GetSerial(), ca.Serial(a.Intermediate())) {
			t.Errorf("a record for instance %d: %v", r.GetForInstance(), r)
		}
		named = named || bytes.Equal(r.GetKeyHash(), hash[:]) && r.GetForInstance() == 2
	}
	if cn := b.Intermediate().Subject.CommonName; !named || !strings.HasPrefix(cn, "intermediate 2 ") {
		t.Errorf("no record says that %q was signed for instance 2", cn)
	}
	for _, w := range []*world{a, b} {
		intact(t, w)
	}
}

// TestReplicasThatMustNotHoldARoot are refused by the configuration check.
func TestReplicasThatMustNotHoldARoot(t *testing.T) {
	t.Parallel()
	shared := newShared(t)
	one := func(c *ca.Config) { c.Shared, c.RootReplica = shared, 1 }
	a := newWorld(t, brisk, one, func(c *ca.Config) { c.Instance = 1 })
	stopA := a.run()
	b := newWorld(t, brisk, one)
	stopA()
	stray := filepath.Join(b.cfg.DataDir, ca.FolderName, "keys", "root-0123.key")
	b.close()
	for name, c := range map[string]struct {
		edit func(*ca.Config)
		says string
	}{
		"nobody is named":               {func(c *ca.Config) { c.RootReplica = 0 }, "authority.rootReplica"},
		"an instance that there is not": {func(c *ca.Config) { c.RootReplica = 200 }, "must be an instance"},
		"a root that is not its own":    {func(c *ca.Config) { c.OfflineRoot = true }, "no replica has its key"},
		"no other replicas":             {func(c *ca.Config) { c.Shared = ca.Shared{} }, "it is for several"},
		"a way to the root":             {newDevice().configure, "needs no way to it"},
		"the key of a root in the folder": {func(*ca.Config) {
			if err := os.WriteFile(stray, []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "must not hold it"},
	} {
		cfg := b.cfg
		c.edit(&cfg)
		if _, err := ca.Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
		_ = os.Remove(stray)
	}
	// A replica that is named and has no key of the root does not make another.
	b.cfg.RootReplica = 2
	if _, err := ca.Open(t.Context(), b.cfg); err == nil || !strings.Contains(err.Error(), "key") {
		t.Errorf("named, without the key: %v", err)
	}
}

// TestAnAuthorityBecomesTheFirstOfSeveral, with the root that it has, where it is.
func TestAnAuthorityBecomesTheFirstOfSeveral(t *testing.T) {
	t.Parallel()
	a := newWorld(t, brisk, withCRL)
	client, _ := a.attest(agentA)
	leaf, root := a.leaf(client), a.Root()
	if _, err := adminOf(t, a).Revoke(t.Context(), &capb.RevokeRequest{Serial: ca.Serial(leaf[0]), Reason: 1}); err != nil {
		t.Fatal(err)
	}
	seq := trustOf(a).Sequence()
	a.close()
	shared := newShared(t)
	m := replica.Migration{Dir: filepath.Join(a.cfg.DataDir, ca.FolderName), Store: shared.Store, Files: shared.Files, Place: "there", Wait: 50 * time.Millisecond}
	if _, err := m.ToShared(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.cfg.Shared, a.cfg.Instance = shared, 0
	if _, err := ca.Open(t.Context(), a.cfg); err == nil || !strings.Contains(err.Error(), "authority.rootReplica") {
		t.Errorf("without a name: %v", err)
	}
	a.cfg.RootReplica = 1
	a.open()
	defer a.run()()
	b := newWorld(t, brisk, withCRL, func(c *ca.Config) { c.Shared, c.RootReplica = shared, 1 })
	defer b.run()()
	if !a.Root().Equal(root) || !b.Root().Equal(root) || b.Intermediate().CheckSignatureFrom(root) != nil || rootKeys(b) != 0 {
		t.Error("they are not below the root that there was")
	}
	eventually(t, "both to hand out what was revoked before", func() bool {
		return trustOf(b).Sequence() > seq && a.revoked(leaf) && b.revoked(leaf) && len(trustOf(a).CRLs()) == 2
	})
	for _, w := range []*world{a, b} {
		intact(t, w)
	}
}

// TestAStepThatAnotherReplicaHoldsUp is left to it, and after a while an alarm says so.
func TestAStepThatAnotherReplicaHoldsUp(t *testing.T) {
	t.Parallel()
	shared := newShared(t)
	reg := prometheus.NewRegistry()
	a := newWorld(t, brisk, newDevice().configure, func(c *ca.Config) { c.Shared, c.Metrics = shared, reg })
	held := must(shared.Store.Lease(t.Context(), "rotation", 10*time.Second))
	half := time.Now().Add(5 * time.Hour) // of eight
	a.SetClock(func() time.Time { return half }, half)
	alarm := func() string { return fmt.Sprint(a.Alarms()) }
	due := func() {
		t.Helper()
		if err := a.RotateDue(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	due()
	if since := a.HeldUpSince(time.Now().Add(-time.Hour)); since.IsZero() || strings.Contains(alarm(), "not done") || len(must(a.Stages())) != 1 {
		t.Errorf("held up since %v: %s, %v", since, alarm(), must(a.Stages()))
	}
	due()
	if !strings.Contains(alarm(), "is due since") || !strings.Contains(alarm(), "another replica holds the lease") || len(must(a.Stages())) != 1 {
		t.Errorf("after an hour: %s, %v", alarm(), must(a.Stages()))
	}
	n := 0.0
	for _, f := range must(reg.Gather()) {
		if f.GetName() == "signet_ca_rotation_held_up_total" {
			n = f.GetMetric()[0].GetCounter().GetValue()
		}
	}
	// Where somebody has done it, or it is not due any more, that is over.
	a.SetClock(time.Now, time.Now())
	due()
	if since := a.HeldUpSince(time.Now()); !since.IsZero() || strings.Contains(alarm(), "not done") {
		t.Errorf("when nothing is due it is held up since %v: %s", since, alarm())
	}
	a.SetClock(func() time.Time { return half }, half)
	due()
	if since := a.HeldUpSince(time.Now()); since.IsZero() || strings.Contains(alarm(), "not done") {
		t.Errorf("when it is due again it is held up since %v: %s", since, alarm())
	}
	if n < 2 {
		t.Errorf("it was held up at least twice, and %v is counted", n)
	}
	if err := held.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	due()
	if since := a.HeldUpSince(time.Now()); !since.IsZero() || strings.Contains(alarm(), "not done") || len(must(a.Stages())) != 2 {
		t.Errorf("afterwards it is held up since %v: %s, %v", since, alarm(), must(a.Stages()))
	}
}
