package holder

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-mesh/signet/identity"
)

// stateVersion is the newest format that decodeState reads. Version 2 has CRLs;
// encodeState writes version 1 where there are none, which an older program reads too.
const stateVersion = 2

const stateMagic = "signet-agent-state "

// The file's own types: the format does not change because a type of the program
// does. Adding a field means a new version.
type (
	fileState struct {
		Saved   time.Time         `json:"saved"`
		NodeUID string            `json:"nodeUID"`
		TokenBy time.Time         `json:"tokenBy"`
		Agent   *fileSVID         `json:"agent"`
		Trust   *fileTrust        `json:"trust"`
		Pods    []filePod         `json:"pods"`
		SVIDs   []fileSVID        `json:"svids"`
		Extra   map[string][]byte `json:"extra"`
	}
	fileSVID struct {
		ID      string    `json:"id"`
		Chain   [][]byte  `json:"chain"`   // DER, leaf first
		Key     int       `json:"keySize"` // of its key among the keys at the end, in bytes
		RenewAt time.Time `json:"renewAt"`
	}
	fileTrust struct {
		Sequence    uint64   `json:"sequence"`
		TrustDomain string   `json:"trustDomain"`
		Roots       [][]byte `json:"roots"`
		CRLs        [][]byte `json:"crls,omitempty"`
	}
	filePod struct {
		Namespace      string `json:"namespace"`
		ServiceAccount string `json:"serviceAccount"`
		// Agents are not told the UID of a service account.
		ServiceAccountUID string            `json:"serviceAccountUID,omitempty"`
		Pod               string            `json:"pod"`
		PodUID            string            `json:"podUID"`
		Node              string            `json:"node"`
		NodeUID           string            `json:"nodeUID"`
		Labels            map[string]string `json:"labels"`
		Addresses         []netip.Addr      `json:"addresses"`
		UnixUID           *uint32           `json:"unixUID"`
	}
)

// encodeState is the content of a state file. The keys are kept out of the JSON,
// whose encoder has buffers of its own that nobody could clear.
func encodeState(s State) (data []byte, err error) {
	var keys [][]byte
	defer func() {
		for _, k := range keys {
			clear(k)
		}
	}()
	svid := func(v *x509svid.SVID, renewAt time.Time) (fileSVID, error) {
		if v == nil {
			return fileSVID{}, errors.New("an SVID to be saved is missing")
		}
		key, err := x509.MarshalPKCS8PrivateKey(v.PrivateKey)
		if err != nil {
			return fileSVID{}, fmt.Errorf("encoding the key of %s: %w", v.ID, err)
		}
		keys = append(keys, key)
		f := fileSVID{ID: v.ID.String(), Key: len(key), RenewAt: renewAt.UTC()}
		for _, c := range v.Certificates {
			f.Chain = append(f.Chain, c.Raw)
		}
		return f, nil
	}
	out := fileState{Saved: s.Saved.UTC(), NodeUID: s.NodeUID, TokenBy: s.TokenBy.UTC(), Extra: s.Extra}
	if s.Agent != nil {
		agent, err := svid(s.Agent, s.AgentRenewAt)
		if err != nil {
			return nil, err
		}
		out.Agent = &agent
	}
	if s.Trust != nil {
		out.Trust = &fileTrust{Sequence: s.Trust.Sequence(), TrustDomain: s.Trust.TrustDomain().Name()}
		for _, c := range s.Trust.Roots() {
			out.Trust.Roots = append(out.Trust.Roots, c.Raw)
		}
		for _, c := range s.Trust.CRLs() {
			out.Trust.CRLs = append(out.Trust.CRLs, c.Raw)
		}
	}
	for _, w := range s.Pods {
		out.Pods = append(out.Pods, filePod(w))
	}
	for _, held := range s.SVIDs {
		f, err := svid(held.SVID, held.RenewAt)
		if err != nil {
			return nil, err
		}
		out.SVIDs = append(out.SVIDs, f)
	}
	text, err := json.Marshal(out)
	if err != nil {
		return nil, fmt.Errorf("encoding: %w", err)
	}
	version := 1
	if out.Trust != nil && len(out.Trust.CRLs) > 0 {
		version = 2
	}
	first := stateMagic + strconv.Itoa(version) + "\n"
	size := len(first) + hex.EncodedLen(sha256.Size) + 1 + len(text) + 1
	for _, k := range keys {
		size += len(k)
	}
	if size > maxState {
		return nil, fmt.Errorf("it would have %d bytes; at most %d are allowed", size, maxState)
	}
	// One allocation of the final size: a slice that grows leaves copies behind.
	body := make([]byte, 0, size)
	body = append(append(body, text...), '\n')
	for _, k := range keys {
		body = append(body, k...)
	}
	defer clear(body)
	data = make([]byte, 0, size)
	data = append(append(append(data, first...), stateHash(first, body)...), '\n')
	return append(data, body...), nil
}

// stateHash is the second line of a state file.
func stateHash(first string, body []byte) string {
	h := sha256.New()
	io.WriteString(h, first)
	h.Write(body)
	return hex.EncodeToString(h.Sum(nil))
}

// decodeState is the state that data holds, without what has expired at now.
// Keys are only read from data, never copied but into the keys that are returned.
func decodeState(data []byte, now time.Time) (State, error) {
	first, rest, ok := bytes.Cut(data, []byte("\n"))
	number, magic := strings.CutPrefix(string(first[:min(len(first), 64)]), stateMagic)
	version, err := strconv.ParseUint(number, 10, 32)
	switch {
	case !ok || !magic || err != nil:
		return State{}, errors.New("it is not a state file")
	case version > stateVersion:
		return State{}, fmt.Errorf("%w: version %d, and this program reads up to %d", ErrNewerState, version, stateVersion)
	case version < 1:
		return State{}, fmt.Errorf("it has version %d, which never was", version)
	}
	hash, body, ok := bytes.Cut(rest, []byte("\n"))
	if !ok || stateHash(string(first)+"\n", body) != string(hash) {
		return State{}, errors.New("it is damaged: its hash does not match")
	}
	text, keys, ok := bytes.Cut(body, []byte("\n"))
	if !ok {
		return State{}, errors.New("it is incomplete")
	}
	var in fileState
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&in); err != nil {
		return State{}, fmt.Errorf("decoding: %w", err)
	}
	s := State{Saved: in.Saved, NodeUID: in.NodeUID, TokenBy: in.TokenBy, Extra: in.Extra}
	if in.Trust != nil {
		if s.Trust, err = in.Trust.decode(); err != nil {
			return State{}, err
		}
	}
	for _, w := range in.Pods {
		s.Pods = append(s.Pods, identity.Workload(w))
	}
	next := func(f fileSVID) (Held, time.Time, error) {
		if f.Key < 0 || f.Key > len(keys) {
			return Held{}, time.Time{}, fmt.Errorf("the key of %s is missing", f.ID)
		}
		key := keys[:f.Key]
		keys = keys[f.Key:]
		return f.decode(key, s.Trust)
	}
	if in.Agent != nil {
		agent, expires, err := next(*in.Agent)
		if err != nil {
			return State{}, err
		}
		if _, ok := identity.AgentNode(agent.SVID.ID); !ok {
			return State{}, fmt.Errorf("%s is not an agent", agent.SVID.ID)
		}
		if now.Before(expires) {
			s.Agent, s.AgentRenewAt = agent.SVID, agent.RenewAt
		}
	}
	for _, f := range in.SVIDs {
		held, expires, err := next(f)
		if err != nil {
			return State{}, err
		}
		if now.Before(expires) {
			s.SVIDs = append(s.SVIDs, held)
		}
	}
	if len(keys) > 0 {
		return State{}, errors.New("it holds more keys than SVIDs")
	}
	return s, nil
}

func (f *fileTrust) decode() (*identity.Trust, error) {
	td, err := identity.ParseTrustDomain(f.TrustDomain)
	if err != nil {
		return nil, err
	}
	var roots []*x509.Certificate
	for i, der := range f.Roots {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("root %d of %s: %w", i, td.Name(), err)
		}
		roots = append(roots, c)
	}
	t, err := identity.NewTrust(f.Sequence, td, roots)
	if err != nil {
		return nil, err
	}
	var lists []*x509.RevocationList
	for i, der := range f.CRLs {
		c, err := x509.ParseRevocationList(der)
		if err != nil {
			return nil, fmt.Errorf("CRL %d of %s: %w", i, td.Name(), err)
		}
		lists = append(lists, c)
	}
	return t.WithCRLs(lists)
}

// decode checks all but the signatures, which depend on the trust of the moment
// in which the SVID is used.
func (f *fileSVID) decode(pkcs8 []byte, trust *identity.Trust) (h Held, expires time.Time, err error) {
	id, err := identity.ParseID(f.ID)
	if err != nil {
		return Held{}, time.Time{}, err
	}
	fail := func(err error) (Held, time.Time, error) {
		return Held{}, time.Time{}, fmt.Errorf("SVID of %s: %w", id, err)
	}
	if trust != nil && id.TrustDomain() != trust.TrustDomain() {
		return fail(fmt.Errorf("trust is of trust domain %s", trust.TrustDomain().Name()))
	}
	chain, err := parseChain(f.Chain)
	if err != nil {
		return fail(err)
	}
	key, err := parseKey(pkcs8)
	if err != nil {
		return fail(err)
	}
	expires, err = checkLeaf(chain, key.Public(), id)
	if err != nil {
		return fail(err)
	}
	return Held{SVID: &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}, RenewAt: f.RenewAt}, expires, nil
}

func parseKey(pkcs8 []byte) (*ecdsa.PrivateKey, error) {
	key, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		// The reason could quote the key.
		return nil, errors.New("its key cannot be parsed")
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("its key is a %T; ECDSA is expected", key)
	}
	return ec, nil
}
