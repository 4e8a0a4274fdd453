package source

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/signet-mesh/signet/authz/token"
)

const (
	// maxKeyBytes bounds what a server of keys may answer.
	maxKeyBytes = 1 << 20
	// maxKeyRedirects is how often it may send elsewhere.
	maxKeyRedirects = 3
	// discovery is where an issuer has its OpenID configuration (OpenID Connect
	// Discovery section 4).
	discovery = "/.well-known/openid-configuration"
)

// String is the origin for people, without a password.
func (o keyOrigin) String() string {
	where := o.uri
	if where == "" {
		where = strings.TrimSuffix(o.issuer, "/") + discovery
	}
	u, err := url.Parse(where)
	if err != nil {
		return "a URL that cannot be read"
	}
	u.RawQuery = ""
	return u.Redacted()
}

// newKeyClient is a client that reaches no more than cfg allows, whatever names
// resolve to and wherever servers send it.
func newKeyClient(cfg KeySetsConfig) *http.Client {
	dialer := &net.Dialer{
		Timeout: maxKeyTimeout,
		// Control sees the address that is about to be connected to, so no name can
		// resolve to something else in between.
		Control: func(_, address string, _ syscall.RawConn) error {
			at, err := netip.ParseAddrPort(address)
			if err != nil {
				return fmt.Errorf("the address %q cannot be read", address)
			}
			return permitted(at.Addr(), cfg.AllowAddresses)
		},
	}
	return &http.Client{
		Transport: &http.Transport{
			// No proxy: it would resolve and connect for us, without these checks.
			Proxy:             nil,
			DialContext:       dialer.DialContext,
			DisableKeepAlives: true, DisableCompression: true,
			TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: cfg.Roots},
			MaxResponseHeaderBytes: 64 << 10,
		},
		CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if len(via) > maxKeyRedirects {
				return fmt.Errorf("sent elsewhere more than %d times", maxKeyRedirects)
			}
			return checkScheme(r.URL, cfg.AllowPlaintext)
		},
	}
}

func checkScheme(u *url.URL, plaintext bool) error {
	switch {
	case strings.EqualFold(u.Scheme, "https"), strings.EqualFold(u.Scheme, "http") && plaintext:
		return nil
	case strings.EqualFold(u.Scheme, "http"):
		return errors.New("it is an http:// URL, and keys that come in plaintext can be replaced on the way; use https://, or allow it with policies.keys.allowPlaintext")
	}
	return errors.New("it is no https:// URL")
}

// fetch gets and reads the keys of an origin.
func (k *KeySets) fetch(ctx context.Context, o keyOrigin, timeout time.Duration) ([]byte, *token.Keys, error) {
	uri := o.uri
	if uri == "" {
		text, err := k.get(ctx, strings.TrimSuffix(o.issuer, "/")+discovery, timeout)
		if err != nil {
			return nil, nil, fmt.Errorf("the issuer's OpenID configuration: %w", err)
		}
		var answer struct {
			URI string `json:"jwks_uri"`
		}
		if json.Unmarshal(text, &answer) != nil || answer.URI == "" {
			return nil, nil, errors.New("the issuer's OpenID configuration has no jwks_uri")
		}
		uri = answer.URI
	}
	text, err := k.get(ctx, uri, timeout)
	if err != nil {
		return nil, nil, err
	}
	keys, err := token.ParseKeys(text)
	if err != nil {
		return nil, nil, err
	}
	return text, keys, nil
}

// get gets a document.
func (k *KeySets) get(ctx context.Context, uri string, timeout time.Duration) ([]byte, error) {
	u, err := url.Parse(uri)
	if err != nil || u.Host == "" {
		return nil, errors.New("the URL cannot be read")
	}
	if err := checkScheme(u, k.cfg.AllowPlaintext); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no complete answer within %s", timeout))
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, uri, nil)
	if err != nil {
		return nil, errors.New("the URL cannot be read")
	}
	r.Header.Set("User-Agent", "signet-agent")
	r.Header.Set("Accept", "application/json")
	resp, err := k.client.Do(r)
	if err != nil {
		// The URL, which may hold a password, is told elsewhere.
		var at *url.Error
		if errors.As(err, &at) {
			err = at.Err
		}
		return nil, causeOf(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return nil, fmt.Errorf("the server answers %d", resp.StatusCode)
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxKeyBytes+1))
	// An answer that ends as the time does is none, even if it ends well.
	if err != nil || ctx.Err() != nil {
		return nil, causeOf(ctx, err)
	}
	if len(text) > maxKeyBytes {
		return nil, fmt.Errorf("the answer has more than %d bytes", maxKeyBytes)
	}
	return text, nil
}

// causeOf says why a context ended, where that is why something failed.
func causeOf(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// special are the addresses that are not of the public Internet (the registries of
// IANA for special purposes), and so of no use to a stranger's keys.
var special = prefixes("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24",
	"192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3",
	"::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8")

// metadata are the addresses at which clouds give credentials to whoever asks.
var metadata = prefixes("169.254.169.254/32", "169.254.170.2/32", "169.254.170.23/32", "168.63.129.16/32", "100.100.100.200/32", "192.0.0.192/32",
	"fd00:ec2::254/128", "fd00:ec2::23/128", "fd20:ce::254/128")

// nat64 is where IPv4 addresses are in IPv6 ones (RFC 6052).
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

func prefixes(texts ...string) (list []netip.Prefix) {
	for _, t := range texts {
		list = append(list, netip.MustParsePrefix(t))
	}
	return list
}

// permitted says why an address must not be connected to, or nothing.
func permitted(a netip.Addr, allow []netip.Prefix) error {
	a = a.Unmap().WithZone("")
	if nat64.Contains(a) {
		b := a.As16()
		a = netip.AddrFrom4([4]byte(b[12:]))
	}
	within := func(list []netip.Prefix) bool {
		return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a) })
	}
	switch {
	case within(metadata):
		if slices.ContainsFunc(allow, func(p netip.Prefix) bool { return p.IsSingleIP() && p.Addr() == a }) {
			return nil
		}
		return fmt.Errorf("%s is an address where a cloud gives out credentials; it would have to be named in policies.keys.allowAddresses by itself", a)
	case within(allow), !within(special) && a.IsGlobalUnicast():
		return nil
	}
	return fmt.Errorf("%s is not a public address; if keys may be fetched there, allow it with policies.keys.allowAddresses", a)
}
