package attest_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"

	"github.com/signet-mesh/signet/identity"
	"github.com/signet-mesh/signet/identity/attest"
	"github.com/signet-mesh/signet/identity/attest/devissuer"
)

func ExampleAttestor_Attest() {
	dir, err := os.MkdirTemp("", "issuer")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	issuer, _, err := devissuer.Create(dir, devissuer.Options{})
	if err != nil {
		log.Fatal(err)
	}
	keys, err := attest.OpenKeys(attest.KeysConfig{File: filepath.Join(dir, devissuer.JWKSFile)})
	if err != nil {
		log.Fatal(err)
	}
	var pods identity.Pods
	attestor, err := attest.New(attest.Config{
		Issuer: issuer.URL(), Audience: "signet", Keys: keys, Pods: &pods,
		Node: "node-a", AnyServiceAccount: true,
	})
	if err != nil {
		log.Fatal(err)
	}

	token, err := issuer.Token(devissuer.Claims{
		Audience: []string{"signet"}, Namespace: "default", ServiceAccount: "server",
		Pod: "server-0", PodUID: "7d1f", Node: "node-a",
	}, time.Now())
	if err != nil {
		log.Fatal(err)
	}
	_, _, err = attestor.Attest(context.Background(), attest.Evidence{Token: token})
	fmt.Println(errors.Is(err, attest.ErrUnknownPod), attest.Public(err))

	pods.Set(identity.Workload{Namespace: "default", ServiceAccount: "server", Pod: "server-0", PodUID: "7d1f", Node: "node-a"})
	w, until, err := attestor.Attest(context.Background(), attest.Evidence{Token: token})
	fmt.Println(w.Namespace, w.ServiceAccount, time.Until(until) > 0, err)
	// Output:
	// true the pod of the service-account token is not known here (yet)
	// default server true <nil>
}

func ExampleGate() {
	var attestor *attest.Attestor // as above
	var pods *identity.Pods
	gate, err := attest.NewGate(attest.GateConfig{
		Attestor: attestor, Pods: pods,
		Open: []string{"/grpc.health.v1.Health/Check"},
	})
	if err != nil {
		return
	}
	grpc.NewServer(grpc.UnaryInterceptor(gate.Unary), grpc.StreamInterceptor(gate.Stream))
}
