package issuancelog

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/signet-mesh/signet/ca/capb"

	"google.golang.org/protobuf/types/known/timestamppb"
)

// entry is a record in JSON. Bytes are hexadecimal.
type entry struct {
	Instance  uint32     `json:"instance"`
	Sequence  uint64     `json:"sequence"`
	Time      time.Time  `json:"time"`
	Kind      string     `json:"kind"`
	Serial    string     `json:"serial,omitempty"`
	SPIFFEID  string     `json:"spiffeID,omitempty"`
	Node      string     `json:"node,omitempty"`
	Evidence  string     `json:"evidence,omitempty"`
	PodUID    string     `json:"podUID,omitempty"`
	Requester string     `json:"requester,omitempty"`
	Authority string     `json:"authority,omitempty"`
	NotBefore *time.Time `json:"notBefore,omitempty"`
	NotAfter  *time.Time `json:"notAfter,omitempty"`
	KeyHash   string     `json:"keyHash,omitempty"`
	TokenAt   *time.Time `json:"tokenAt,omitempty"`
	Door      string     `json:"door,omitempty"`
	// ForInstance is the replica for which the one with the root signed an intermediate.
	ForInstance uint32    `json:"forInstance,omitempty"`
	Decision    *decision `json:"decision,omitempty"`
}

type decision struct {
	What     string `json:"what"`
	Instance uint32 `json:"instance"`
	Sequence uint64 `json:"sequence"`
	Hash     string `json:"hash,omitempty"`
	Reason   string `json:"reason,omitempty"`
	By       string `json:"by,omitempty"`
	// Of a certificate that was revoked.
	Serial    string     `json:"serial,omitempty"`
	SPIFFEID  string     `json:"spiffeID,omitempty"`
	CRLReason uint32     `json:"crlReason,omitempty"`
	NotAfter  *time.Time `json:"notAfter,omitempty"`
	// Of a ban.
	Subject string     `json:"subject,omitempty"`
	Until   *time.Time `json:"until,omitempty"`
}

func entryOf(p *capb.LogEntry) entry {
	r := p.GetRecord()
	e := entry{Instance: p.GetInstance(), Sequence: p.GetSequence(), Time: p.GetTime().AsTime(), Kind: word(r.GetKind().String(), "KIND_"),
		Serial: hex.EncodeToString(r.GetSerial()), SPIFFEID: r.GetSpiffeId(), Node: r.GetNode(), PodUID: r.GetPodUid(),
		Requester: hex.EncodeToString(r.GetRequester()), Authority: hex.EncodeToString(r.GetAuthority()),
		KeyHash: hex.EncodeToString(r.GetKeyHash()), Door: r.GetDoor(), NotBefore: seconds(r.GetNotBefore()), NotAfter: seconds(r.GetNotAfter()),
		TokenAt: seconds(r.GetTokenAt()), ForInstance: r.GetForInstance()}
	if r.GetEvidence() != capb.IssuanceRecord_EVIDENCE_UNSPECIFIED {
		e.Evidence = word(r.GetEvidence().String(), "EVIDENCE_")
	}
	if d := r.GetDecision(); d != nil {
		e.Decision = &decision{What: word(d.GetWhat().String(), "WHAT_"), Instance: d.GetInstance(), Sequence: d.GetSequence(),
			Hash: hex.EncodeToString(d.GetHash()), Reason: d.GetReason(), By: d.GetBy()}
		if b := d.GetBan(); b != nil {
			e.Decision.Subject, e.Decision.Until = b.GetSubject(), seconds(b.GetUntil())
		}
		if r := d.GetRevoked(); r != nil {
			e.Decision.Serial, e.Decision.SPIFFEID = hex.EncodeToString(r.GetSerial()), r.GetSpiffeId()
			e.Decision.CRLReason, e.Decision.NotAfter = r.GetReason(), seconds(r.GetNotAfter())
		}
	}
	return e
}

// word is a name of an enumeration as people read it: KIND_WORKLOAD is workload.
func word(name, prefix string) string {
	return strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(name, prefix)), "_", "-")
}

func seconds(s int64) *time.Time {
	if s == 0 {
		return nil
	}
	t := time.Unix(s, 0).UTC()
	return &t
}

// printable keeps what is not text off a terminal.
func printable(s string) string {
	q := strconv.Quote(s)
	return q[1 : len(q)-1]
}

// signedHead is a head in JSON.
type signedHead struct {
	Instance  uint32    `json:"instance"`
	Sequence  uint64    `json:"sequence"`
	Hash      string    `json:"hash"` // hexadecimal
	Time      time.Time `json:"time"`
	Signature []byte    `json:"signature"` // base64
}

func headOf(p *capb.LogHead) signedHead {
	return signedHead{Instance: p.GetInstance(), Sequence: p.GetSequence(), Hash: hex.EncodeToString(p.GetHash()), Time: p.GetTime().AsTime(), Signature: p.GetSignature()}
}

func parseHead(b []byte) (*capb.LogHead, error) {
	var h signedHead
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&h); err != nil {
		return nil, err
	}
	hash, err := hex.DecodeString(h.Hash)
	if err != nil || len(hash) != 32 {
		return nil, fmt.Errorf("its hash %q is not 32 bytes in hexadecimal", h.Hash)
	}
	if h.Instance == 0 || h.Sequence == 0 || len(h.Signature) == 0 {
		return nil, errors.New("instance, sequence or signature is missing")
	}
	return &capb.LogHead{Instance: h.Instance, Sequence: h.Sequence, Hash: hash, Time: timestamppb.New(h.Time), Signature: h.Signature}, nil
}

// report is what verification found, in JSON.
type report struct {
	Problems []string    `json:"problems"`
	More     uint64      `json:"more,omitempty"`
	Logs     []logReport `json:"logs"`
	Entries  uint64      `json:"entries,omitempty"`
}

type logReport struct {
	Instance     uint32      `json:"instance"`
	First        uint64      `json:"first"`
	Last         uint64      `json:"last"`
	Certificates uint64      `json:"certificates"`
	Heads        uint64      `json:"heads"`
	Head         *signedHead `json:"head,omitempty"`
	Pruned       *time.Time  `json:"pruned,omitempty"`
	Torn         uint64      `json:"torn,omitempty"`
}

// Report prints what verification found, as text or json, and returns ErrProblems
// if that is not nothing.
func Report(w io.Writer, v *capb.VerifyResponse, output string) error {
	var err error
	switch output {
	case "json":
		r := report{Problems: []string{}, More: v.GetMore(), Entries: v.GetEntries(), Logs: []logReport{}}
		r.Problems = append(r.Problems, v.GetProblems()...)
		for _, l := range v.GetLogs() {
			o := logReport{Instance: l.GetInstance(), First: l.GetFirst(), Last: l.GetLast(), Certificates: l.GetCertificates(), Heads: l.GetHeads(), Torn: l.GetTorn()}
			if l.GetHead() != nil {
				h := headOf(l.GetHead())
				o.Head = &h
			}
			if l.GetPruned() != nil {
				t := l.GetPruned().AsTime()
				o.Pruned = &t
			}
			r.Logs = append(r.Logs, o)
		}
		err = json.NewEncoder(w).Encode(r)
	case "text":
		err = reportText(w, v)
	default:
		return fmt.Errorf("--output: %q is not text or json", output)
	}
	if err == nil && len(v.GetProblems()) > 0 {
		return fmt.Errorf("%w: %d", ErrProblems, uint64(len(v.GetProblems()))+v.GetMore())
	}
	return err
}

func reportText(w io.Writer, v *capb.VerifyResponse) error {
	var b strings.Builder
	for _, l := range v.GetLogs() {
		fmt.Fprintf(&b, "log of instance %d: records %d to %d, %d certificates, %d signed heads", l.GetInstance(), l.GetFirst(), l.GetLast(), l.GetCertificates(), l.GetHeads())
		if l.GetHead() != nil {
			fmt.Fprintf(&b, ", signed up to record %d", l.GetHead().GetSequence())
		}
		if l.GetPruned() != nil {
			fmt.Fprintf(&b, ", pruned at %s", l.GetPruned().AsTime().Format(time.RFC3339))
		}
		b.WriteByte('\n')
	}
	if v.GetEntries() > 0 {
		fmt.Fprintf(&b, "state: %d entries\n", v.GetEntries())
	}
	for _, p := range v.GetProblems() {
		fmt.Fprintf(&b, "PROBLEM %s\n", printable(p))
	}
	if v.GetMore() > 0 {
		fmt.Fprintf(&b, "and %d more\n", v.GetMore())
	}
	if len(v.GetProblems()) == 0 {
		b.WriteString("ok\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}
