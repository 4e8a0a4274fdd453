package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"hash/crc32"
)

// childEnv makes this test binary the program itself.
const childEnv = "SIGNET_TEST_BE_THE_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// TestTheProgramIsTheSame: all of cmd/ca but what opens key devices is linked here.
func TestTheProgramIsTheSame(t *testing.T) {
	files, err := filepath.Glob("../*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		name := filepath.Base(f)
		if strings.HasSuffix(name, "_test.go") || strings.HasPrefix(name, "kms_") {
			continue
		}
		if to, err := os.Readlink(name); err != nil || to != f {
			t.Errorf("run: ln -s %s cmd/ca/cloudkms/%s", f, name)
		}
	}
}

// clouds are the three services, as far as a root that exists is used: what the
// program's own client libraries send is taken and answered as their documentation
// says. No cloud is asked: every connection ends here.
type clouds struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	root *x509.Certificate // of the services' own TLS
	rkey *ecdsa.PrivateKey
	tls  net.Listener

	mu    sync.Mutex
	calls []string // guarded by mu
}

func (c *clouds) called(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.calls = append(c.calls, fmt.Sprintf(format, args...))
}

func (c *clouds) count(prefix string) (n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, call := range c.calls {
		if strings.HasPrefix(call, prefix) {
			n++
		}
	}
	return n
}

func newClouds(t *testing.T) *clouds {
	c := &clouds{t: t, key: newKey(t), rkey: newKey(t)}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "no cloud"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	c.root = sign(t, tmpl, tmpl, c.rkey.Public(), c.rkey)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	google := grpc.NewServer()
	kmspb.RegisterKeyManagementServiceServer(google, googleKMS{c: c})
	s := &http.Server{TLSConfig: &tls.Config{GetCertificate: c.certificate}, ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch host := strings.TrimSuffix(r.Host, ":443"); {
		case host == "kms.eu-west-1.amazonaws.com":
			c.amazon(w, r)
		case host == "cloudkms.googleapis.com":
			google.ServeHTTP(w, r)
		case host == "oauth2.googleapis.com", host == "login.microsoftonline.com":
			c.login(w, r)
		case host == "signet-test.vault.azure.net":
			c.azure(w, r)
		default:
			c.called("unexpected host %s %s", host, r.URL.Path)
			http.Error(w, "nobody is here", http.StatusNotFound)
		}
	})}
	c.tls = l
	done := make(chan struct{})
	go func() { defer close(done); _ = s.ServeTLS(l, "", "") }()
	t.Cleanup(func() { google.Stop(); _ = s.Close(); <-done })
	return c
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func sign(t *testing.T, tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		t.Error(err)
		return nil
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Error(err)
	}
	return cert
}

func (c *clouds) certificate(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
	cert := sign(c.t, &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), DNSNames: []string{h.ServerName}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, c.root, c.rkey.Public(), c.rkey)
	return &tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: c.rkey}, nil
}

// proxy is an HTTP proxy that takes every connection to the services that are not there.
func (c *clouds) proxy() string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		c.t.Fatal(err)
	}
	s := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect {
			c.called("unexpected %s %s", r.Method, r.URL)
			http.Error(w, "only CONNECT", http.StatusBadGateway)
			return
		}
		up, err := net.Dial("tcp", c.tls.Addr().String())
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer up.Close()
		down, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer down.Close()
		_, _ = io.WriteString(down, "HTTP/1.1 200 OK\r\n\r\n")
		go func() { _, _ = io.Copy(up, buffered); _ = up.(*net.TCPConn).CloseWrite() }()
		_, _ = io.Copy(down, up)
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	c.t.Cleanup(func() { _ = s.Close(); <-done })
	return "http://" + l.Addr().String()
}

func answer(w http.ResponseWriter, contentType string, v any) {
	w.Header().Set("Content-Type", contentType)
	_ = json.NewEncoder(w).Encode(v)
}

func (c *clouds) public() []byte {
	der, err := x509.MarshalPKIXPublicKey(c.key.Public())
	if err != nil {
		c.t.Error(err)
	}
	return der
}

// amazon is AWS KMS: GetPublicKey and Sign of the JSON 1.1 protocol.
func (c *clouds) amazon(w http.ResponseWriter, r *http.Request) {
	var q struct {
		KeyId, MessageType, SigningAlgorithm string
		Message                              []byte
	}
	err := json.NewDecoder(r.Body).Decode(&q)
	c.called("aws %s %s %s %s", r.Header.Get("X-Amz-Target"), q.KeyId, q.MessageType, q.SigningAlgorithm)
	if err != nil || !strings.HasPrefix(r.Header.Get("Authorization"), "AWS4-HMAC-SHA256 Credential=AKIDTEST/") || q.KeyId != "1234abcd" {
		http.Error(w, `{"__type":"AccessDeniedException"}`, http.StatusBadRequest)
		return
	}
	const kind = "application/x-amz-json-1.1"
	switch r.Header.Get("X-Amz-Target") {
	case "TrentService.GetPublicKey":
		answer(w, kind, map[string]any{"KeyId": q.KeyId, "PublicKey": c.public(), "KeySpec": "ECC_NIST_P256", "KeyUsage": "SIGN_VERIFY", "SigningAlgorithms": []string{"ECDSA_SHA_256"}})
	case "TrentService.Sign":
		if q.MessageType != "DIGEST" || q.SigningAlgorithm != "ECDSA_SHA_256" || len(q.Message) != 32 {
			http.Error(w, `{"__type":"ValidationException"}`, http.StatusBadRequest)
			return
		}
		signature, err := ecdsa.SignASN1(rand.Reader, c.key, q.Message)
		if err != nil {
			c.t.Error(err)
		}
		answer(w, kind, map[string]any{"KeyId": q.KeyId, "Signature": signature, "SigningAlgorithm": q.SigningAlgorithm})
	default:
		http.Error(w, `{"__type":"UnknownOperationException"}`, http.StatusBadRequest)
	}
}

// login is what gives out bearer tokens at Google and Microsoft.
func (c *clouds) login(w http.ResponseWriter, r *http.Request) {
	const base = "https://login.microsoftonline.com/tenant-1"
	switch {
	case strings.HasSuffix(r.URL.Path, "/discovery/instance"):
		answer(w, "application/json", map[string]any{"tenant_discovery_endpoint": base + "/v2.0/.well-known/openid-configuration",
			"metadata": []any{map[string]any{"preferred_network": "login.microsoftonline.com", "preferred_cache": "login.windows.net", "aliases": []string{"login.microsoftonline.com"}}}})
	case strings.HasSuffix(r.URL.Path, "/openid-configuration"):
		answer(w, "application/json", map[string]any{"authorization_endpoint": base + "/oauth2/v2.0/authorize", "token_endpoint": base + "/oauth2/v2.0/token", "issuer": base + "/v2.0"})
	default:
		c.called("token %s", r.Host)
		answer(w, "application/json", map[string]any{"access_token": "bearer-test", "token_type": "Bearer", "expires_in": 3600})
	}
}

// azure is Azure Key Vault's REST API: the challenge, the key, and sign.
func (c *clouds) azure(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Authorization") != "Bearer bearer-test" {
		c.called("azure challenge")
		w.Header().Set("WWW-Authenticate", `Bearer authorization="https://login.microsoftonline.com/tenant-1", resource="https://vault.azure.net"`)
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	b64 := base64.RawURLEncoding
	c.called("azure %s %s", r.Method, r.URL.Path)
	switch {
	case r.Method == http.MethodGet && strings.HasPrefix(r.URL.Path, "/keys/root"):
		point, err := c.key.PublicKey.Bytes()
		if err != nil {
			c.t.Error(err)
		}
		answer(w, "application/json", map[string]any{"key": map[string]any{"kid": "https://signet-test.vault.azure.net/keys/root/1", "kty": "EC", "crv": "P-256",
			"x": b64.EncodeToString(point[1:33]), "y": b64.EncodeToString(point[33:]), "key_ops": []string{"sign"}}})
	case r.Method == http.MethodPost && strings.HasSuffix(r.URL.Path, "/sign"):
		var q struct{ Alg, Value string }
		err := json.NewDecoder(r.Body).Decode(&q)
		digest, digestErr := b64.DecodeString(q.Value)
		if err = errors.Join(err, digestErr); err != nil || q.Alg != "ES256" || len(digest) != 32 {
			http.Error(w, "bad request", http.StatusBadRequest)
			return
		}
		x, y, err := ecdsa.Sign(rand.Reader, c.key, digest)
		if err != nil {
			c.t.Error(err)
		}
		raw := append(x.FillBytes(make([]byte, 32)), y.FillBytes(make([]byte, 32))...)
		answer(w, "application/json", map[string]any{"kid": "https://signet-test.vault.azure.net/keys/root/1", "value": b64.EncodeToString(raw)})
	default:
		http.Error(w, "not found", http.StatusNotFound)
	}
}

// googleKMS is Google Cloud KMS: GetPublicKey and AsymmetricSign.
type googleKMS struct {
	kmspb.UnimplementedKeyManagementServiceServer
	c *clouds
}

const googleKey = "projects/p/locations/europe-west1/keyRings/signet/cryptoKeys/root/cryptoKeyVersions/1"

func (g googleKMS) allowed(ctx context.Context, name string) error {
	md, _ := metadata.FromIncomingContext(ctx)
	if auth := md.Get("authorization"); len(auth) != 1 || !strings.HasPrefix(auth[0], "Bearer ") || name != googleKey {
		return fmt.Errorf("key %s with %d authorizations", name, len(auth))
	}
	return nil
}

func (g googleKMS) GetPublicKey(ctx context.Context, q *kmspb.GetPublicKeyRequest) (*kmspb.PublicKey, error) {
	g.c.called("google GetPublicKey %s", q.GetName())
	if err := g.allowed(ctx, q.GetName()); err != nil {
		return nil, err
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: g.c.public()})
	return &kmspb.PublicKey{Name: q.GetName(), Pem: string(text), Algorithm: kmspb.CryptoKeyVersion_EC_SIGN_P256_SHA256, PemCrc32C: crc(text)}, nil
}

func (g googleKMS) AsymmetricSign(ctx context.Context, q *kmspb.AsymmetricSignRequest) (*kmspb.AsymmetricSignResponse, error) {
	g.c.called("google AsymmetricSign %s", q.GetName())
	if err := g.allowed(ctx, q.GetName()); err != nil {
		return nil, err
	}
	signature, err := ecdsa.SignASN1(rand.Reader, g.c.key, q.GetDigest().GetSha256())
	return &kmspb.AsymmetricSignResponse{Name: q.GetName(), Signature: signature, SignatureCrc32C: crc(signature), VerifiedDigestCrc32C: q.GetDigestCrc32C() != nil}, err
}

func crc(b []byte) *wrapperspb.Int64Value {
	return wrapperspb.Int64(int64(crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli))))
}

// TestTheRootInACloud: the whole program makes its root with a key in each cloud's key
// management, and has it sign the intermediate.
func TestTheRootInACloud(t *testing.T) {
	c := newClouds(t)
	proxy := c.proxy()
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	roots := write("services.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.root.Raw}))
	account, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(account)
	if err != nil {
		t.Fatal(err)
	}
	credentials, err := json.Marshal(map[string]string{"type": "service_account", "project_id": "p", "client_email": "signet@p.iam.gserviceaccount.com", "private_key_id": "1",
		"private_key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})), "token_uri": "https://oauth2.googleapis.com/token"})
	if err != nil {
		t.Fatal(err)
	}
	google := write("google.json", credentials)
	jwks := write("jwks.json", []byte(fmt.Sprintf(`{"keys":[{"kty":"EC","crv":"P-256","kid":"1","use":"sig","alg":"ES256","x":"%s","y":"%s"}]}`, coordinates(t, c.key)[0], coordinates(t, c.key)[1])))
	for _, cloud := range []struct{ name, uri, sign string }{
		{"aws", "awskms:region=eu-west-1;key-id=1234abcd", "aws TrentService.Sign 1234abcd DIGEST ECDSA_SHA_256"},
		{"google", "cloudkms:" + googleKey + "?credentials-file=" + google, "google AsymmetricSign " + googleKey},
		{"azure", "azurekms:name=root;vault=signet-test;version=1", "azure POST /keys/root/1/sign"},
	} {
		t.Run(cloud.name, func(t *testing.T) {
			data := filepath.Join(dir, cloud.name)
			if err := os.Mkdir(data, 0o700); err != nil {
				t.Fatal(err)
			}
			root := filepath.Join(dir, cloud.name+".pem")
			config := write(cloud.name+".yaml", []byte(fmt.Sprintf("dataDir: %s\nlisten: 127.0.0.1:0\nhttp: {listen: \"\"}\npublish: {rootFile: %s}\nauthority: {keys: {root: %q}}\n"+
				"tokens: {issuer: https://issuer.test, jwksFile: %s}\n", data, root, cloud.uri, jwks)))
			cmd := exec.Command(os.Args[0], "serve", "--config", config)
			cmd.Env = []string{childEnv + "=1", "HOME=" + dir, "PATH=" + os.Getenv("PATH"), "HTTPS_PROXY=" + proxy, "HTTP_PROXY=" + proxy, "SSL_CERT_FILE=" + roots, "SSL_CERT_DIR=" + dir + "/none",
				"AWS_ACCESS_KEY_ID=AKIDTEST", "AWS_SECRET_ACCESS_KEY=secret", "AWS_EC2_METADATA_DISABLED=true",
				"AZURE_TENANT_ID=tenant-1", "AZURE_CLIENT_ID=client-1", "AZURE_CLIENT_SECRET=secret"}
			out := &strings.Builder{}
			cmd.Stdout, cmd.Stderr = out, out
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			var text []byte
			for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(20 * time.Millisecond) {
				var err error
				if text, err = os.ReadFile(root); err == nil {
					break
				}
				select {
				case err := <-ended:
					t.Fatalf("it ended: %v\n%s\n%q", err, out, c.calls)
				default:
				}
				if time.Now().After(deadline) {
					_ = cmd.Process.Kill()
					<-ended
					t.Fatalf("it does not serve\n%s\n%q", out, c.calls)
				}
			}
			_ = cmd.Process.Signal(syscall.SIGTERM)
			if err := <-ended; err != nil {
				t.Errorf("%v\n%s", err, out)
			}
			block, _ := pem.Decode(text)
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil || !c.key.PublicKey.Equal(cert.PublicKey) || cert.CheckSignatureFrom(cert) != nil {
				t.Errorf("the root is not of the key in the cloud: %v", err)
			}
			// The root itself and the intermediate; no key of the root is on the disk.
			if n := c.count(cloud.sign); n < 2 {
				t.Errorf("%d signatures; the calls were %q", n, c.calls)
			}
			keys, err := filepath.Glob(data + "/authority/keys/root-*")
			if err != nil || len(keys) != 0 {
				t.Errorf("on the disk: %v, %v", keys, err)
			}
			if n := c.count("unexpected"); n != 0 {
				t.Errorf("other calls: %q", c.calls)
			}
			t.Logf("%d signatures by %s", c.count(cloud.sign), cloud.uri)
		})
	}
}

func coordinates(t *testing.T, key *ecdsa.PrivateKey) [2]string {
	point, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return [2]string{base64.RawURLEncoding.EncodeToString(point[1:33]), base64.RawURLEncoding.EncodeToString(point[33:])}
}
