// Command stepca is step-ca for tests, and the command that has an intermediate signed
// by it:
//
//	stepca serve ca.json
//	stepca sign --ca-url URL --root FILE --provisioner NAME --password-file FILE
//
// serve is what smallstep's step-ca does, without the key managers of clouds. sign is a
// value of authority.upstream.exec: it reads a request and prints a chain. It does
// what `step ca sign` does.
package main

import (
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/smallstep/certificates/api"
	"github.com/smallstep/certificates/authority/config"
	"github.com/smallstep/certificates/ca"
	"go.step.sm/crypto/pemutil"
)

func main() {
	var err error
	switch {
	case len(os.Args) == 3 && os.Args[1] == "serve":
		err = serve(os.Args[2])
	case len(os.Args) > 1 && os.Args[1] == "sign":
		err = sign(os.Args[2:])
	default:
		err = fmt.Errorf("want serve CONFIG or sign")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "stepca:", err)
		os.Exit(1)
	}
}

func serve(file string) error {
	cfg, err := config.LoadConfiguration(file)
	if err != nil {
		return err
	}
	srv, err := ca.New(cfg, ca.WithConfigFile(file), ca.WithQuiet(true))
	if err != nil {
		return err
	}
	end := make(chan os.Signal, 1)
	signal.Notify(end, os.Interrupt, syscall.SIGTERM)
	go func() { <-end; _ = srv.Stop() }()
	if err := srv.Run(); err != nil && !strings.Contains(err.Error(), "Server closed") {
		return err
	}
	return nil
}

func sign(args []string) error {
	flags := flag.NewFlagSet("sign", flag.ContinueOnError)
	url := flags.String("ca-url", "", "of step-ca")
	root := flags.String("root", "", "PEM file of its root")
	name := flags.String("provisioner", "", "a JWK provisioner whose template makes intermediates")
	passwordFile := flags.String("password-file", "", "what the provisioner's key is encrypted with")
	if err := flags.Parse(args); err != nil {
		return err
	}
	password, err := os.ReadFile(*passwordFile)
	if err != nil {
		return err
	}
	text, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	csr, err := pemutil.ParseCertificateRequest(text)
	if err != nil {
		return err
	}
	p, err := ca.NewProvisioner(*name, "", *url, []byte(strings.TrimSpace(string(password))), ca.WithRootFile(*root))
	if err != nil {
		return err
	}
	var sans []string
	for _, u := range csr.URIs {
		sans = append(sans, u.String())
	}
	token, err := p.Token(csr.Subject.CommonName, sans...)
	if err != nil {
		return err
	}
	req := &api.SignRequest{CsrPEM: api.CertificateRequest{CertificateRequest: csr}, OTT: token}
	if n, err := strconv.Atoi(os.Getenv("SIGNET_TTL_SECONDS")); err == nil {
		req.NotAfter = api.NewTimeDuration(time.Now().Add(time.Duration(n) * time.Second))
	}
	resp, err := p.Sign(req)
	if err != nil {
		return err
	}
	for _, c := range resp.CertChainPEM {
		if err := pem.Encode(os.Stdout, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
			return err
		}
	}
	return nil
}
