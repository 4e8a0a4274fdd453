package attest

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// savedProofs is what Export writes. It holds hashes of tokens, and no token. A
// change that older versions must not ignore means a new version.
type (
	savedProofs struct {
		Version int          `json:"version"`
		Proofs  []savedProof `json:"proofs"`
	}
	savedProof struct {
		Token             []byte    `json:"token"` // SHA-256 of it
		KeyID             string    `json:"kid"`
		Key               []byte    `json:"key"` // SHA-256 of its SubjectPublicKeyInfo
		Expires           time.Time `json:"expires"`
		Namespace         string    `json:"namespace"`
		ServiceAccount    string    `json:"serviceAccount"`
		ServiceAccountUID string    `json:"serviceAccountUID,omitempty"`
		Pod               string    `json:"pod"`
		PodUID            string    `json:"podUID"`
		Node              string    `json:"node"`
		NodeUID           string    `json:"nodeUID,omitempty"`
	}
)

const savedProofsVersion = 1

// Export is what is remembered of accepted tokens, for a successor, and a channel
// that is closed when more is. Those that have expired are left out, unless an outage keeps them.
func (a *Attestor) Export() (saved []byte, changed <-chan struct{}) {
	_, changed = a.cache.changed.Load()
	out := savedProofs{Version: savedProofsVersion, Proofs: []savedProof{}}
	now := time.Now()
	a.cache.each(func(sum [sha256.Size]byte, p *proof) {
		if !now.Before(p.expires) && !a.held(p) {
			return
		}
		key, err := keyHash(p.key)
		if err != nil {
			return // a key that algorithmFor accepted
		}
		out.Proofs = append(out.Proofs, savedProof{
			Token: sum[:], KeyID: p.kid, Key: key, Expires: p.expires.UTC(),
			Namespace: p.namespace, ServiceAccount: p.serviceAccount, ServiceAccountUID: p.serviceAccountUID,
			Pod: p.pod, PodUID: p.podUID, Node: p.node, NodeUID: p.nodeUID,
		})
	})
	saved, err := json.Marshal(out)
	if err != nil {
		return nil, changed
	}
	return saved, changed
}

// Load remembers what Export wrote. Each proof is held against the keys and the pods
// of the moment in which it is used; those whose key the issuer does not have now are
// left out.
func (a *Attestor) Load(saved []byte) error {
	var in savedProofs
	if err := json.Unmarshal(saved, &in); err != nil {
		return fmt.Errorf("loading accepted tokens: %w", err)
	}
	if in.Version != savedProofsVersion || in.Proofs == nil {
		return fmt.Errorf("loading accepted tokens: version %d, and this program reads %d", in.Version, savedProofsVersion)
	}
	if len(in.Proofs) > a.cfg.CacheSize {
		return fmt.Errorf("loading accepted tokens: %d of them; at most %d are remembered", len(in.Proofs), a.cfg.CacheSize)
	}
	for _, s := range in.Proofs {
		if len(s.Token) != sha256.Size || s.Expires.IsZero() || s.PodUID == "" || s.Namespace == "" || s.ServiceAccount == "" {
			return errors.New("loading accepted tokens: an entry is damaged")
		}
	}
	now := time.Now()
	for _, s := range in.Proofs {
		key, ok, err := a.cfg.Keys.Key(context.Background(), s.KeyID)
		if err != nil || !ok {
			continue
		}
		if is, err := keyHash(key); err != nil || string(is) != string(s.Key) {
			continue
		}
		a.cache.add([sha256.Size]byte(s.Token), &proof{
			kid: s.KeyID, key: key, expires: s.Expires,
			namespace: s.Namespace, serviceAccount: s.ServiceAccount, serviceAccountKey: s.Namespace + "/" + s.ServiceAccount,
			serviceAccountUID: s.ServiceAccountUID, pod: s.Pod, podUID: s.PodUID, node: s.Node, nodeUID: s.NodeUID,
		}, now)
	}
	return nil
}

func keyHash(k Key) ([]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(k.Public)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(der)
	return sum[:], nil
}
