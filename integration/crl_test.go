package integration_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/external/externaltest"
	"github.com/signet-mesh/signet/integration/envoytest"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/grpc"
)

// ownSVID is workload i's, with its key, as a proxy gets it.
func (s *standalone) ownSVID(ctx context.Context, conn *grpc.ClientConn, i int) tls.Certificate {
	s.tb.Helper()
	r, err := fetch(s.as(ctx, i), conn, "default")
	if err != nil {
		s.tb.Fatal(err)
	}
	var secret tlsv3.Secret
	if err := r.GetResources()[0].UnmarshalTo(&secret); err != nil {
		s.tb.Fatal(err)
	}
	c, err := tls.X509KeyPair(secret.GetTlsCertificate().GetCertificateChain().GetInlineBytes(), secret.GetTlsCertificate().GetPrivateKey().GetInlineBytes())
	if err != nil {
		s.tb.Fatal(err)
	}
	return c
}

// over asks a server on a new connection with a client certificate; 0 if it is refused.
func over(addr string, cert tls.Certificate) (int, error) {
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}}}}
	resp, err := client.Get("https://" + addr + "/")
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, nil
}

func (s *standalone) signet(args ...string) string {
	s.tb.Helper()
	cmd := exec.Command(filepath.Join(s.bin, "signet"), args...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.tb.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	return string(out)
}

// TestARevokedSVIDIsRefusedByEnvoy: of two clients one is revoked; the other goes on.
func TestARevokedSVIDIsRefusedByEnvoy(t *testing.T) {
	s := newStandalone(t, programs(t), 3, "", func(s *standalone) {
		s.caYAML, s.agent = "authority: {crl: {enabled: true}}\n", "sds: {crl: true}\n"
	})
	ask, inbound := s.pairAt()
	becomes(t, 200, "/", func(string) int { return ask() })
	requests := load(t, 200, ask)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	conn := s.dial()
	stolen, other := s.ownSVID(ctx, conn, 2), s.ownSVID(ctx, conn, 1)
	for name, c := range map[string]tls.Certificate{"to be revoked": stolen, "the other": other} {
		if code, err := over(inbound, c); code != 200 {
			t.Fatalf("before, %s: %d, %v", name, code, err)
		}
	}
	began := time.Now()
	t.Logf("revoke prints\n%s", s.signet("ca", "revoke", "--socket", s.dir+"/ca/admin.sock", fmt.Sprintf("%x", stolen.Leaf.SerialNumber.FillBytes(make([]byte, 17))), "--reason", "keyCompromise", "--comment", "stolen"))
	var refused error
	until(t, "Envoy refuses the revoked SVID", func() bool {
		_, refused = over(inbound, stolen)
		// A refusal can come as a closed connection, without its alert.
		return refused != nil && strings.Contains(refused.Error(), "revoked")
	})
	t.Logf("%v after the command Envoy says: %v", time.Since(began).Round(time.Millisecond), refused)
	if code, err := over(inbound, other); code != 200 {
		t.Errorf("the other SVID: %d, %v", code, err)
	}
	requests.held(t, "two Envoys, while another's SVID is revoked")
	shown := s.signet("ca", "crl", "show", "--socket", s.dir+"/ca/admin.sock")
	t.Logf("crl show prints\n%s", shown)
	if !strings.Contains(shown, "keyCompromise") || !strings.Contains(shown, "stolen") {
		t.Error("crl show does not name it")
	}

	// The same list over HTTP, for others; openssl reads it.
	resp, err := http.Get("http://" + s.http["signet-ca"] + "/crl/all.pem")
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("%d, %v", resp.StatusCode, err)
	}
	s.write("crl.pem", string(text))
	if out := s.openssl("crl", "-in", "crl.pem", "-noout", "-text"); !strings.Contains(out, "Key Compromise") {
		t.Errorf("openssl reads\n%s", out)
	}
	id := fmt.Sprintf("%x", stolen.Leaf.AuthorityKeyId)
	if resp, err = http.Get("http://" + s.http["signet-ca"] + "/crl/" + id + ".crl"); err != nil {
		t.Fatal(err)
	}
	der, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if block, _ := pem.Decode(text); err != nil || resp.Header.Get("Content-Type") != "application/pkix-crl" || !bytes.Equal(block.Bytes, der) {
		t.Errorf("%s.crl: %v, %v", id, resp.Header, err)
	}
}

// TestRotationWithCRLsUnderTraffic: proxies that check lists meet SVIDs of the next
// intermediates only when they have their lists.
func TestRotationWithCRLsUnderTraffic(t *testing.T) {
	s := newStandalone(t, programs(t), 2, "", func(s *standalone) {
		s.caYAML = "authority: {crl: {enabled: true}, intermediateTTL: 40s, rootTTL: 10m, propagation: 1s}\n" + brief
		s.agent = "sds: {crl: true}\n"
	})
	ask, inbound := s.pairAt()
	becomes(t, 200, "/", func(string) int { return ask() })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	conn := s.dial()
	first := s.ownSVID(ctx, conn, 1)
	issuers := map[string]bool{}
	requests := load(t, 200, func() int {
		if code := ask(); code != 200 {
			return code
		}
		code, err := over(inbound, s.ownSVID(ctx, conn, 1)) // a handshake each
		if err != nil {
			t.Log(err)
		}
		return code
	})
	until(t, "two more intermediates are in use", func() bool {
		c := s.ownSVID(ctx, conn, 1)
		issuers[string(c.Leaf.AuthorityKeyId)] = true
		return len(issuers) == 3
	})
	requests.held(t, fmt.Sprintf("%d intermediates since %s", len(issuers), first.Leaf.NotBefore.Format(time.RFC3339)))
}

// TestWhatEnvoyDoesWithCRLs holds the documentation to what a real Envoy does, with the
// configuration that the agent gives it.
func TestWhatEnvoyDoesWithCRLs(t *testing.T) {
	t.Parallel()
	root := externaltest.Root(t, "root", externaltest.P256)
	inter, other := root.Intermediate(t, "one", externaltest.P256), root.Intermediate(t, "two", externaltest.P256)
	leaf := func(i *externaltest.Signer) tls.Certificate {
		c := i.Intermediate(t, "leaf", externaltest.P256, externaltest.SPIFFE("spiffe://cluster.local/ns/a/sa/b"), func(c *x509.Certificate) {
			c.IsCA, c.MaxPathLen, c.KeyUsage = false, 0, x509.KeyUsageDigitalSignature
			c.BasicConstraintsValid = false
		})
		return tls.Certificate{Certificate: [][]byte{c.Cert.Raw, i.Cert.Raw}, PrivateKey: c.Key, Leaf: c.Cert}
	}
	good, bad, unlisted := leaf(inter), leaf(inter), leaf(other)
	list := func(from, to time.Duration) string {
		der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(from), NextUpdate: time.Now().Add(to),
			RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: bad.Leaf.SerialNumber, RevocationTime: time.Now().Add(-time.Hour), ReasonCode: 1}}}, inter.Cert, inter.Key)
		if err != nil {
			t.Fatal(err)
		}
		return string(pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der}))
	}
	for _, c := range []struct {
		name, crl           string
		good, bad, unlisted int
	}{
		{"without a CRL", "", 200, 200, 200},
		{"with one", list(-time.Minute, time.Hour), 200, 0, 0},
		{"with one that expired", list(-time.Hour, -time.Second), 0, 0, 0},
		{"with one of the future", list(time.Hour, 2*time.Hour), 0, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			addr := freeAddr(t)
			files := map[string][]byte{"root.pem": externaltest.PEM(root.Cert), "cert.pem": append(externaltest.PEM(good.Leaf), externaltest.PEM(inter.Cert)...),
				"key.pem": externaltest.KeyPEM(t, good.PrivateKey.(crypto.Signer)), "crl.pem": []byte(c.crl)}
			for name, b := range files {
				if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			crl := ""
			if c.crl != "" {
				crl = fmt.Sprintf("crl: {filename: %s/crl.pem}, only_verify_leaf_cert_crl: true, ", dir)
			}
			host, port, _ := strings.Cut(addr, ":")
			file := filepath.Join(dir, "envoy.yaml")
			text := fmt.Sprintf(`admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}
static_resources:
  listeners:
  - name: in
    address: {socket_address: {address: %s, port_value: %s}}
    filter_chains:
    - transport_socket:
        name: tls
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context:
            tls_certificates: [{certificate_chain: {filename: %s/cert.pem}, private_key: {filename: %s/key.pem}}]
            validation_context: {%strusted_ca: {filename: %s/root.pem}}
      filters:
      - name: http
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          route_config: {virtual_hosts: [{name: all, domains: ["*"], routes: [{match: {prefix: /}, direct_response: {status: 200}}]}]}
          http_filters: [{name: router, typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}]
`, host, port, dir, dir, crl, dir)
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			envoytest.Start(t, file).WaitReady(t)
			for name, try := range map[string]struct {
				cert tls.Certificate
				want int
			}{"good": {good, c.good}, "revoked": {bad, c.bad}, "of an authority without a list": {unlisted, c.unlisted}} {
				code, err := over(addr, try.cert)
				t.Logf("%s: %d %v", name, code, err)
				if code != try.want {
					t.Errorf("%s: %d, %v; want %d", name, code, err, try.want)
				}
			}
		})
	}
}
