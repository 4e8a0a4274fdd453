package source

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"
	"time"
)

const (
	// savedVersion is the format that encodeSaved writes, and the newest that
	// decodeSaved reads.
	savedVersion = 1
	// maxSaved bounds saved policies, compressed; maxSavedText when they are not.
	maxSaved     = 16 << 20
	maxSavedText = 256 << 20
)

// The format is one line of JSON, savedHeader, and gzip of one JSON value,
// savedPolicies. It does not change because a type of the program does. What older
// versions must not ignore means a new version.
type (
	savedHeader struct {
		Version int `json:"version"`
		// Good is when the policies were last known to be the cluster's.
		Good time.Time `json:"good"`
	}
	savedPolicies struct {
		Policies []savedPolicy `json:"policies"`
	}
	savedPolicy struct {
		Key  string          `json:"key"` // KIND NAMESPACE/NAME
		Text json.RawMessage `json:"text"`
		// Good is the last good version, where that is not Text.
		Good json.RawMessage `json:"good,omitempty"`
		// Refused says that there is no good version.
		Refused bool `json:"refused,omitempty"`
	}
)

// encodeSaved is the part of saved policies after the header.
func encodeSaved(docs map[string]clusterDoc) ([]byte, error) {
	out := savedPolicies{Policies: []savedPolicy{}}
	for _, key := range slices.Sorted(maps.Keys(docs)) {
		d := docs[key]
		p := savedPolicy{Key: key, Text: d.text, Refused: d.good == nil}
		if d.good != nil && !bytes.Equal(d.good, d.text) {
			p.Good = d.good
		}
		out.Policies = append(out.Policies, p)
	}
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(json.NewEncoder(z).Encode(out), z.Close()); err != nil {
		return nil, fmt.Errorf("encoding policies: %w", err)
	}
	if b.Len() > maxSaved {
		return nil, fmt.Errorf("encoding policies: they have %d bytes; at most %d are saved", b.Len(), maxSaved)
	}
	return b.Bytes(), nil
}

// exported is what Export tells of one snapshot, encoded when it is asked for: a
// change must not wait for that. docs is never changed.
type exported struct {
	docs map[string]clusterDoc
	once sync.Once
	body []byte
	err  error
}

func (e *exported) encode() ([]byte, error) {
	e.once.Do(func() { e.body, e.err = encodeSaved(e.docs) })
	return e.body, e.err
}

// withHeader is saved policies that were good at a time.
func withHeader(good time.Time, body []byte) []byte {
	head, err := json.Marshal(savedHeader{savedVersion, good.UTC()})
	if err != nil {
		return nil // a time beyond the year 9999
	}
	return slices.Concat(head, []byte("\n"), body)
}

// decodeSaved is what withHeader and encodeSaved made.
func decodeSaved(saved []byte) (good time.Time, docs map[string]clusterDoc, err error) {
	fail := func(err error) (time.Time, map[string]clusterDoc, error) {
		return time.Time{}, nil, fmt.Errorf("decoding saved policies: %w", err)
	}
	head, body, ok := bytes.Cut(saved, []byte("\n"))
	var h savedHeader
	if err := json.Unmarshal(head, &h); err != nil || !ok {
		return fail(errors.New("they have no header"))
	}
	switch {
	case h.Version > savedVersion:
		return fail(fmt.Errorf("version %d, and this program reads up to %d", h.Version, savedVersion))
	case h.Version < 1 || h.Good.IsZero():
		return fail(errors.New("their header is damaged"))
	}
	z, err := gzip.NewReader(bytes.NewReader(body))
	if err != nil {
		return fail(err)
	}
	text, err := io.ReadAll(io.LimitReader(z, maxSavedText+1))
	if err != nil {
		return fail(err)
	}
	if len(text) > maxSavedText {
		return fail(fmt.Errorf("more than %d bytes", maxSavedText))
	}
	var in savedPolicies
	if err := json.Unmarshal(text, &in); err != nil {
		return fail(err)
	}
	if in.Policies == nil {
		return fail(errors.New("they are incomplete"))
	}
	docs = make(map[string]clusterDoc, len(in.Policies))
	for _, p := range in.Policies {
		if _, twice := docs[p.Key]; twice || p.Key == "" || len(p.Text) == 0 || p.Refused && p.Good != nil {
			return fail(fmt.Errorf("the entry of %q is damaged", p.Key))
		}
		d := clusterDoc{text: p.Text}
		switch {
		case p.Good != nil:
			d.good = p.Good
		case !p.Refused:
			d.good = d.text
		}
		docs[p.Key] = d
	}
	return h.Good, docs, nil
}
