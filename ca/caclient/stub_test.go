package caclient_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/caclient"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

// stub is an authority that does what a test tells it, for one agent that has attested.
// Streams that it has no function for stay open and say no more than they must.
type stub struct {
	capb.UnimplementedAuthorityServer
	root       *x509.Certificate
	key        *ecdsa.PrivateKey
	addr       string
	watchTrust func(grpc.BidiStreamingServer[capb.WatchTrustRequest, capb.WatchTrustResponse]) error
	watchNode  func(grpc.ServerStreamingServer[capb.WatchNodeResponse]) error
	issue      func(grpc.BidiStreamingServer[capb.IssueRequest, capb.IssueResponse]) error
}

func (s *stub) WatchTrust(st grpc.BidiStreamingServer[capb.WatchTrustRequest, capb.WatchTrustResponse]) error {
	if s.watchTrust != nil {
		return s.watchTrust(st)
	}
	<-st.Context().Done()
	return nil
}

func (s *stub) WatchNode(_ *capb.WatchNodeRequest, st grpc.ServerStreamingServer[capb.WatchNodeResponse]) error {
	if s.watchNode != nil {
		return s.watchNode(st)
	}
	if err := st.Send(&capb.WatchNodeResponse{Full: true}); err != nil {
		return err
	}
	<-st.Context().Done()
	return nil
}

func (s *stub) Issue(st grpc.BidiStreamingServer[capb.IssueRequest, capb.IssueResponse]) error {
	return s.issue(st)
}

// certify makes a certificate below the root, or the root.
func (s *stub) certify(t *testing.T, id string) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true}
	parent, signer := s.root, s.key
	if id == "" {
		c.IsCA, c.KeyUsage, c.Subject = true, x509.KeyUsageCertSign, pkix.Name{CommonName: "root"}
		parent, signer = c, key
	} else {
		u, err := url.Parse(id)
		if err != nil {
			t.Fatal(err)
		}
		c.URIs, c.KeyUsage, c.ExtKeyUsage = []*url.URL{u}, x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return c, key
}

// start serves, and returns the configuration of an agent that has an SVID of it.
func (s *stub) start(t *testing.T) caclient.Config {
	t.Helper()
	if s.root == nil {
		s.root, s.key = s.certify(t, "")
	}
	cert, key := s.certify(t, "spiffe://cluster.local/signet/ca/1")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, ClientAuth: tls.RequestClientCert,
		Certificates: []tls.Certificate{{Certificate: [][]byte{cert.Raw}, PrivateKey: key}}})))
	capb.RegisterAuthorityServer(server, s)
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(l) }()
	t.Cleanup(func() { server.Stop(); <-done })
	s.addr = l.Addr().String()
	trust, err := identity.NewTrust(7, td, []*x509.Certificate{s.root})
	if err != nil {
		t.Fatal(err)
	}
	const id = "spiffe://cluster.local/signet/agent/node-a"
	own, ownKey := s.certify(t, id)
	dir := t.TempDir()
	write(t, filepath.Join(dir, "root.pem"), trust.PEM())
	return caclient.Config{Addresses: []string{s.addr}, TrustDomain: td, Node: "node-a", Pods: &identity.Pods{},
		RootFile: filepath.Join(dir, "root.pem"), TokenFile: filepath.Join(dir, "token"), SavedTrust: trust,
		Saved: &caclient.Credential{SVID: &x509svid.SVID{ID: spiffeid.RequireFromString(id), Certificates: []*x509.Certificate{own}, PrivateKey: ownKey},
			RenewAt: time.Now().Add(30 * time.Minute), TokenBy: time.Now().Add(time.Hour)}}
}

// trust is what it says of trust; a taint is of the root.
func (s *stub) trust(tainted bool) *capb.Trust {
	p := &capb.Trust{Sequence: 7, TrustDomain: td.Name(), Bundles: []*capb.Bundle{{TrustDomain: td.Name(), X509Authorities: [][]byte{s.root.Raw}}}}
	if tainted {
		p.Tainted = [][]byte{s.root.SubjectKeyId}
	}
	return p
}

// TestWhatWasSavedIsNotRenewed: it does not say what is tainted, so an agent that was
// started again has replaced nothing before it was told.
func TestWhatWasSavedIsNotRenewed(t *testing.T) {
	t.Parallel()
	for name, tainted := range map[string]bool{"nothing is tainted": false, "something is tainted": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			heard := make(chan *capb.WatchTrustRequest, 64)
			s := &stub{}
			s.watchTrust = func(st grpc.BidiStreamingServer[capb.WatchTrustRequest, capb.WatchTrustResponse]) error {
				first, err := st.Recv()
				if err != nil {
					return err
				}
				heard <- first
				if err := st.Send(&capb.WatchTrustResponse{Trust: s.trust(tainted)}); err != nil {
					return err
				}
				for {
					m, err := st.Recv()
					if err != nil {
						return err
					}
					heard <- m
				}
			}
			cfg := s.start(t)
			held := make(chan struct{}) // closed when nothing is held any more
			cfg.Tainted = func(t *identity.Trust) (bool, <-chan struct{}) {
				ids, _ := t.Tainted()
				select {
				case <-held:
					return false, nil
				default:
					return len(ids) > 0, held
				}
			}
			run(t, cfg)
			next := func() *capb.WatchTrustRequest {
				t.Helper()
				select {
				case m := <-heard:
					return m
				case <-time.After(time.Minute):
					t.Fatal("it says nothing")
					return nil
				}
			}
			if m := next(); m.GetRenewed() != 0 {
				t.Errorf("before it was told anything it says that what is tainted at sequence %d is replaced", m.GetRenewed())
			}
			if tainted {
				close(held)
				return // its own SVID is below the root, and stays so
			}
			for m := next(); m.GetRenewed() != 7; m = next() {
				if m.GetRenewed() != 0 {
					t.Fatalf("renewed: %d", m.GetRenewed())
				}
			}
		})
	}
}

// TestAStreamThatEndsWhileTheAgentSpeaks: the agent says something new all the time, and
// the authority ends the stream after its answer. Who sends then must not also receive:
// gRPC takes one reader, and a second one may wait for ever.
func TestAStreamThatEndsWhileTheAgentSpeaks(t *testing.T) {
	t.Parallel()
	const agents, streams = 16, 3
	for range agents {
		t.Run("", func(t *testing.T) {
			t.Parallel()
			began := make(chan struct{}, 64)
			s := &stub{}
			s.watchTrust = func(st grpc.BidiStreamingServer[capb.WatchTrustRequest, capb.WatchTrustResponse]) error {
				began <- struct{}{}
				if _, err := st.Recv(); err != nil {
					return err
				}
				if err := st.Send(&capb.WatchTrustResponse{Trust: s.trust(false)}); err != nil {
					return err
				}
				for range 3 {
					if _, err := st.Recv(); err != nil {
						return err
					}
				}
				return status.Error(codes.Unavailable, "it ends")
			}
			cfg := s.start(t)
			var said atomic.Uint64
			always := make(chan struct{})
			close(always)
			cfg.UnknownKeys = func() ([]string, <-chan struct{}) {
				return []string{strconv.FormatUint(said.Add(1), 10)}, always
			}
			_, end := run(t, cfg)
			for n := range streams {
				select {
				case <-began:
				case <-time.After(2 * time.Minute):
					t.Fatalf("after %d streams there is none", n)
				}
			}
			end()
		})
	}
}
