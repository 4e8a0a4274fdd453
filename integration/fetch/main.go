// Command fetch makes the real parts ready that tests and lint use, and prints
// what they are and where:
//
//	go run ./integration/fetch          all of them, as a table
//	go run ./integration/fetch envoy    Envoy; prints only its path
//	go run ./integration/fetch tools    buf, staticcheck and the protoc plugins; prints only their folder
//
// The rest are SoftHSM, step-ca, etcd, kube-apiserver, and Istio's compiler and admission.
//
// What is missing is downloaded or built into the user's cache folder, see
// package parts. Run it at the root of the repository.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/signet-mesh/signet/integration/parts"
)

const toolsModule = "integration/tools"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "fetch:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	envoy := func() (parts.Part, error) { return parts.FetchEnvoy(ctx, stderr) }
	tools := func() (parts.Part, error) { return parts.Tools(ctx, toolsModule, stderr) }
	etcd := func() (parts.Part, error) { return parts.BuildEtcd(ctx, ".", stderr) }
	etcdTools := func() (parts.Part, error) { return parts.BuildEtcdTools(ctx, ".", stderr) }
	apiServer := func() (parts.Part, error) { return parts.BuildAPIServer(ctx, ".", stderr) }
	stepCA := func() (parts.Part, error) { return parts.BuildStepCA(ctx, ".", stderr) }
	istio := func() (parts.Part, error) { return parts.BuildIstio(ctx, ".", stderr) }
	softHSM := func() (parts.Part, error) {
		s, err := parts.FetchSoftHSM(ctx, stderr)
		return s.Part, err
	}
	switch {
	case len(args) == 0:
		for _, fetch := range []func() (parts.Part, error){envoy, softHSM, tools, etcd, etcdTools, apiServer, istio, stepCA} {
			part, err := fetch()
			if err != nil {
				return err
			}
			fmt.Fprintf(stdout, "%-14s %-14s %s (%s)\n", part.Name, part.Version, part.Path, part.Origin)
		}
		return nil
	case len(args) == 1 && args[0] == "envoy":
		return printPath(stdout, envoy)
	case len(args) == 1 && args[0] == "tools":
		return printPath(stdout, tools)
	}
	return fmt.Errorf("unknown arguments %q; want none, envoy or tools", args)
}

func printPath(stdout io.Writer, fetch func() (parts.Part, error)) error {
	part, err := fetch()
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(stdout, part.Path)
	return err
}
