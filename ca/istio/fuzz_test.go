package istio_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/istio"

	"google.golang.org/protobuf/proto"
	pb "istio.io/api/security/v1alpha1"
)

// FuzzCSR: whatever is taken is a bounded text with a request whose signature
// verifies with the very key that is returned, of a kind that is certified.
func FuzzCSR(f *testing.F) {
	key := newKey(f)
	good := csrPEM(f, key, &x509.CertificateRequest{DNSNames: []string{"a.example"}})
	f.Add(good)
	f.Add(strings.Replace(good, "BEGIN C", "BEGIN NEW C", 1))
	f.Add(strings.Replace(good, "\n", "\r\n", -1))
	f.Add(good + good)
	f.Add("-----BEGIN CERTIFICATE REQUEST-----\n-----END CERTIFICATE REQUEST-----\n")
	f.Add("")
	f.Fuzz(func(t *testing.T, text string) {
		pub, err := istio.ParseCSR(text)
		if err != nil {
			if pub != nil {
				t.Fatal("a key beside an error")
			}
			return
		}
		if len(text) > istio.MaxCSR {
			t.Fatalf("%d bytes were taken", len(text))
		}
		block, _ := pem.Decode([]byte(text))
		r, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil || r.CheckSignature() != nil || ca.CheckPublicKey(pub) != nil {
			t.Fatalf("%v, %v, %v", err, r.CheckSignature(), ca.CheckPublicKey(pub))
		}
		a, errA := x509.MarshalPKIXPublicKey(pub)
		b, errB := x509.MarshalPKIXPublicKey(r.PublicKey)
		if errA != nil || errB != nil || !bytes.Equal(a, b) {
			t.Fatal("another key was returned")
		}
	})
}

// FuzzRequest: whatever bytes come as a message, a lifetime is within its bounds
// and a key only comes of a CSR that is good.
func FuzzRequest(f *testing.F) {
	add := func(r *pb.IstioCertificateRequest) {
		b, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	good := csrPEM(f, newKey(f), &x509.CertificateRequest{})
	c := &call{req: &pb.IstioCertificateRequest{Csr: good}}
	as("spiffe://cluster.local/ns/a/sa/b")(c)
	add(c.req)
	for _, n := range []int64{-1, 0, 1, 86400, 1 << 62} {
		add(&pb.IstioCertificateRequest{Csr: good, ValidityDuration: n})
	}
	f.Add([]byte("\x0a\x03abc"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m := &pb.IstioCertificateRequest{}
		if proto.Unmarshal(b, m) != nil {
			return
		}
		// Reading the field of metadata must not fail on any shape of it.
		_ = m.GetMetadata().GetFields()["ImpersonatedIdentity"].GetStringValue()
		const most = time.Hour
		if ttl := istio.Lifetime(m.GetValidityDuration(), most); ttl <= 0 || ttl > most {
			t.Fatalf("%d seconds became %v", m.GetValidityDuration(), ttl)
		}
		pub, ttl, err := istio.ParseRequest(m, most)
		if (err == nil) != (pub != nil) || err == nil && (ttl <= 0 || ttl > most) {
			t.Fatalf("%v, %v, %v", pub, ttl, err)
		}
		if again, err := istio.ParseCSR(m.GetCsr()); (err == nil) != (again != nil) || (again == nil) != (pub == nil) {
			t.Fatalf("the CSR alone: %v, %v", again, err)
		}
	})
}
