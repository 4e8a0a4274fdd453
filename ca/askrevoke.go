package ca

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/signet-mesh/signet/ca/profile"
	"github.com/signet-mesh/signet/ca/revocation"
	"github.com/signet-mesh/signet/storage"
)

// Only the replica that issued a certificate has its record and the key that signs the
// list. Another one that is told to revoke it puts that into the state, where the issuer
// finds it, now or when it is back.

const (
	askedPrefix  = "revoke-asked/"
	askedVersion = 1
	// revokeWait is how long an operator waits for the replica that issued.
	revokeWait = 5 * time.Second
	// refusalKept is how long the answer to somebody who is gone stays.
	refusalKept = time.Hour
)

// askedRevocation is what an operator has told another replica.
type askedRevocation struct {
	Version int               `json:"version"`
	Serial  []byte            `json:"serial"`
	Reason  revocation.Reason `json:"reason"`
	Comment string            `json:"comment,omitempty"`
	By      string            `json:"by"`
	At      time.Time         `json:"at"`
	// Refused is why it is not revoked, NotIssued that there is no such certificate.
	Refused   string `json:"refused,omitempty"`
	NotIssued bool   `json:"notIssued,omitempty"`

	rest storage.Rest
}

func askedKey(serial []byte) string { return askedPrefix + hex.EncodeToString(serial) }

func parseAsked(e storage.Entry) (askedRevocation, error) {
	r, rest, err := storage.ParseVersioned(e.Value, askedVersion, func(r askedRevocation) int { return r.Version })
	if err == nil && e.Key != askedKey(r.Serial) {
		err = errors.New("it is of another serial")
	}
	if err != nil {
		return askedRevocation{}, fmt.Errorf("reading %s: %w", e.Key, err)
	}
	r.rest = rest
	return r, nil
}

// serialAsked is whose revocation an entry asks for, which its key says: an entry that
// this build cannot read is for its issuer to answer all the same.
func serialAsked(key string) ([]byte, error) {
	serial, err := hex.DecodeString(strings.TrimPrefix(key, askedPrefix))
	if err != nil || len(serial) != profile.SerialLength || key != askedKey(serial) {
		return nil, fmt.Errorf("reading %s: its key is not that of a serial", key)
	}
	return serial, nil
}

// certainlyOver reports whether a certificate has expired that a replica can have issued
// under a serial, whose record it need not have. A serial carries its time, and no SVID
// lives longer than svid.maxTTL; where that of another replica is longer, no longer than
// an intermediate.
func (a *Authority) certainlyOver(serial []byte) bool {
	life := max(a.cfg.IntermediateTTL, a.cfg.SVID.MaxTTL) + serialSlack
	return a.clock.past().Sub(profile.SerialTime(serial)) > life
}

// elsewhere reports whether another replica issued a certificate.
func (a *Authority) elsewhere(serial []byte) bool {
	return a.cfg.shared() && len(serial) == profile.SerialLength && serial[0] != a.instance && !a.was(serial[0])
}

// askRevoke has the replica that issued a certificate revoke it, and waits for that. Its
// results are those of revoke.
func (a *Authority) askRevoke(ctx context.Context, serial []byte, reason revocation.Reason, comment, by string) (e revocation.Entry, again bool, err error) {
	if e, again := a.revoked.Value()[string(serial)]; again {
		return e, true, nil
	}
	_, there := a.current().Others[fmt.Sprint(serial[0])]
	switch {
	case !reason.Valid():
		return e, false, fmt.Errorf("%w: %v is not one that is taken", errNotRevoked, reason)
	case len(comment) > revocation.MaxComment:
		return e, false, fmt.Errorf("%w: a comment of %d bytes; at most %d are allowed", errNotRevoked, len(comment), revocation.MaxComment)
	case !there:
		return e, false, fmt.Errorf("%w: %x is of instance %d, and no replica is that; if the state was restored since, ask the replica that was it", errNotIssued, serial, serial[0])
	}
	b, err := json.Marshal(askedRevocation{Version: askedVersion, Serial: serial, Reason: reason, Comment: comment, By: by, At: a.clock.stamp().UTC().Truncate(time.Second)})
	if err != nil {
		return e, false, err
	}
	key := askedKey(serial)
	if _, err := a.store.Commit(ctx, nil, []storage.Op{{Key: key, Value: b}}); err != nil {
		return e, false, fmt.Errorf("%w: asking replica %d to revoke: %w", ErrUnavailable, serial[0], err)
	}
	within, cancel := context.WithTimeout(ctx, revokeWait)
	defer cancel()
	for {
		set, changed := a.revoked.Load()
		if e, ok := set[string(serial)]; ok {
			return e, false, nil
		}
		if got, err := a.store.Get(within, key); err == nil {
			r, err := parseAsked(got)
			if err != nil {
				return e, false, err
			}
			if r.Refused != "" {
				_, _ = a.store.Commit(ctx, []storage.Cond{{Key: key, Revision: got.Revision}}, []storage.Op{{Key: key, Delete: true}}) // else it goes in an hour
				kind := errNotRevoked
				if r.NotIssued {
					kind = errNotIssued
				}
				return e, false, fmt.Errorf("%w: replica %d says: %s", kind, serial[0], r.Refused)
			}
		}
		select {
		case <-changed:
		case <-time.After(50 * time.Millisecond):
		case <-within.Done():
			return e, false, fmt.Errorf("%w: replica %d, which issued it, does not answer; it revokes it when it is back, and until then nobody does: ban it (signet ca ban add serial/%x)", ErrUnavailable, serial[0], serial)
		}
	}
}

// answerRevocations revokes what other replicas were told to. Requests that nobody can
// have to answer any more are removed, whoever was asked.
func (a *Authority) answerRevocations(ctx context.Context) error {
	entries, _, err := a.store.List(ctx, askedPrefix)
	if err != nil {
		return fmt.Errorf("revoking for other replicas: %w", err)
	}
	now := a.clock.past()
	var errs, unread []error
	for _, e := range entries {
		serial, err := serialAsked(e.Key)
		if err != nil {
			unread = append(unread, err)
			continue
		}
		own, over := serial[0] == a.instance || a.was(serial[0]), a.certainlyOver(serial)
		if !own && !over {
			continue
		}
		r, unreadable := parseAsked(e)
		switch {
		case unreadable != nil && !over:
			unread = append(unread, unreadable)
			continue
		case unreadable == nil && (!own || r.Refused != "") && now.Sub(r.At) < refusalKept:
			continue // somebody waits for the issuer's answer, or has yet to read it
		}
		op := storage.Op{Key: e.Key, Delete: true}
		if own && unreadable == nil && r.Refused == "" {
			_, _, err = a.revoke(ctx, r.Serial, r.Reason, r.Comment, r.By)
			if r.NotIssued = errors.Is(err, errNotIssued); r.NotIssued || errors.Is(err, errNotRevoked) {
				r.Refused, err = err.Error(), nil
				op.Delete = false
				if op.Value, err = storage.EncodeRecord(r, r.rest); err != nil {
					return err
				}
			}
			if err != nil {
				errs = append(errs, err)
				continue
			}
		}
		if _, err := a.store.Commit(ctx, []storage.Cond{{Key: e.Key, Revision: e.Revision}}, []storage.Op{op}); err != nil && !errors.Is(err, storage.ErrConflict) {
			errs = append(errs, err)
		}
	}
	if err = errors.Join(unread...); err != nil {
		err = fmt.Errorf("%w: the certificate is not revoked: have it banned (signet ca ban add serial/SERIAL), or start the version here that asked", err)
	}
	a.alarm("asked revocations", err)
	if a.cfg.CRL.Enabled && a.listsDue(now) {
		errs = append(errs, a.relist(ctx))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("revoking for other replicas: %w", err)
	}
	return nil
}

// awaitList waits until a list that another replica signs has an entry.
func (a *Authority) awaitList(ctx context.Context, e revocation.Entry) error {
	ctx, cancel := context.WithTimeout(ctx, revokeWait)
	defer cancel()
	for {
		_, changed := a.Trust()
		if a.listHas(e) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("replica %d, which issued it, has not signed a list that has it", e.Serial[0])
		}
	}
}
