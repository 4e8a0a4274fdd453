package main

import (
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/signet-mesh/signet/identity"
)

// endpoint is a host, an IP address or a DNS name, and a port.
type endpoint struct {
	Host string
	Port uint16
}

// IsName reports whether the host is a DNS name.
func (e endpoint) IsName() bool {
	_, err := netip.ParseAddr(e.Host)
	return err != nil
}

// Discovery is the type of an Envoy cluster with this endpoint.
func (e endpoint) Discovery() string {
	if e.IsName() {
		return "STRICT_DNS"
	}
	return "STATIC"
}

// dnsName is a host name (RFC 1123), absolute or not; underscores as Kubernetes
// and Docker allow them nowhere, so not here.
var dnsName = regexp.MustCompile(`^([a-zA-Z0-9]([-a-zA-Z0-9]{0,61}[a-zA-Z0-9])?\.)*[a-zA-Z]([-a-zA-Z0-9]{0,61}[a-zA-Z0-9])?\.?$`)

// parseUpstream parses HOST:PORT, where something is connected to.
func parseUpstream(s string) (endpoint, error) {
	e, err := parseEndpoint(s)
	if err != nil {
		return endpoint{}, err
	}
	if e.Port == 0 {
		return endpoint{}, fmt.Errorf("%q: port 0 cannot be connected to", s)
	}
	if e.IsName() && (len(e.Host) > 254 || !dnsName.MatchString(e.Host)) {
		return endpoint{}, fmt.Errorf("%q: the host is neither an IP address nor a DNS name", s)
	}
	return e, nil
}

// parseListen parses IP:PORT, where something is listened on. With port 0 the
// system chooses one.
func parseListen(s string) (endpoint, error) {
	e, err := parseEndpoint(s)
	if err != nil {
		return endpoint{}, err
	}
	if e.IsName() {
		return endpoint{}, fmt.Errorf("%q: the host must be an IP address, such as :: or 127.0.0.1", s)
	}
	return e, nil
}

// parseLoopback is parseListen for what only this machine, or pod, may reach.
func parseLoopback(s string) (endpoint, error) {
	e, err := parseListen(s)
	if err != nil {
		return endpoint{}, err
	}
	if ip, err := netip.ParseAddr(e.Host); err != nil || !ip.IsLoopback() {
		return endpoint{}, fmt.Errorf("%q is not on loopback, and whoever reached it could act as this workload; use 127.0.0.1 or ::1", s)
	}
	return e, nil
}

func parseEndpoint(s string) (endpoint, error) {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		return endpoint{}, fmt.Errorf("%q is not HOST:PORT, such as 127.0.0.1:8080 or [::1]:8080", s)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return endpoint{}, fmt.Errorf("%q: the port must be a number from 0 to 65535", s)
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		if ip.Zone() != "" {
			return endpoint{}, fmt.Errorf("%q: Envoy takes no address with a zone", s)
		}
		host = ip.String()
	}
	return endpoint{host, uint16(n)}, nil
}

// outboundName ends in names of listeners, clusters and statistics; a dot would
// split the latter.
var outboundName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

const outboundForm = "NAME=LISTEN,UPSTREAM,SPIFFEID[,SPIFFEID…]"

// parseOutbound parses NAME=LISTEN,UPSTREAM,SPIFFEID[,SPIFFEID…].
func parseOutbound(s string) (outbound, error) {
	fail := func(err error) (outbound, error) {
		return outbound{}, fmt.Errorf("%q is not %s: %w", s, outboundForm, err)
	}
	name, rest, ok := strings.Cut(s, "=")
	fields := strings.Split(rest, ",")
	if !ok || len(fields) < 3 {
		return fail(fmt.Errorf("a part is missing"))
	}
	o := outbound{Name: name}
	if !outboundName.MatchString(name) {
		return fail(fmt.Errorf("the name %q must be 1 to 63 of a-z, 0-9 and -, and neither begin nor end with -", name))
	}
	var err error
	if o.Listen, err = parseLoopback(fields[0]); err != nil {
		return fail(err)
	}
	if o.Upstream, err = parseUpstream(fields[1]); err != nil {
		return fail(err)
	}
	for _, f := range fields[2:] {
		id, err := identity.ParseID(f)
		if err != nil {
			return fail(fmt.Errorf("SPIFFE ID %q: %w", f, err))
		}
		// The same root signs agents and authorities; an upstream is neither.
		if id.Path() == "" || strings.HasPrefix(id.Path(), "/signet/") {
			return fail(fmt.Errorf("SPIFFE ID %q does not name a workload, such as spiffe://cluster.local/ns/default/sa/server", f))
		}
		o.IDs = append(o.IDs, id)
	}
	return o, nil
}

// parseLabel parses KEY=VALUE.
func parseLabel(s string) (label, error) {
	key, value, ok := strings.Cut(s, "=")
	if !ok || key == "" {
		return label{}, fmt.Errorf("%q is not KEY=VALUE", s)
	}
	if err := checkText(s); err != nil {
		return label{}, err
	}
	return label{key, value}, nil
}

// parsePath checks the absolute path of a file or socket.
func parsePath(s string) (string, error) {
	if err := checkText(s); err != nil {
		return "", err
	}
	if !filepath.IsAbs(s) {
		return "", fmt.Errorf("%q must be an absolute path: Envoy may run in another folder", s)
	}
	return filepath.Clean(s), nil
}

// checkText refuses what no name, label or path has: control characters, invalid
// UTF-8 and great length. Quoting would keep them from doing harm; a value that
// holds them is a mistake, or somebody's attempt.
func checkText(s string) error {
	if len(s) > 4096 {
		return fmt.Errorf("%.20q… has %d bytes; at most 4096 are allowed", s, len(s))
	}
	if !utf8.ValidString(s) {
		return fmt.Errorf("%q is not valid UTF-8", s)
	}
	if i := strings.IndexFunc(s, unicode.IsControl); i >= 0 {
		return fmt.Errorf("%q has a control character at byte %d", s, i)
	}
	return nil
}

// peerPrefixes are what the SPIFFE ID of a workload of the trust domain or of one
// of its aliases begins with.
func peerPrefixes(trustDomain string, aliases []string) ([]string, error) {
	var prefixes []string
	for _, name := range append([]string{trustDomain}, aliases...) {
		td, err := identity.ParseTrustDomain(name)
		if err != nil {
			return nil, err
		}
		prefixes = append(prefixes, td.IDString()+"/ns/")
	}
	return prefixes, nil
}
