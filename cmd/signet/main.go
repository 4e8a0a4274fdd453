package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/signet-mesh/signet/cmd/signet/demo"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "signet:", err)
		os.Exit(exitCode(err))
	}
}

// exitCode is what a command promises for its error, else 1.
func exitCode(err error) int {
	if e, ok := errors.AsType[interface {
		error
		ExitCode() int
	}](err); ok {
		return e.ExitCode()
	}
	return 1
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	root := newRootCommand()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	return root.ExecuteContext(ctx)
}

func newRootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "signet",
		Short: "Identities and policies for the workloads of a cluster",
		// An error is printed once, by main, and without the usage: that hides it.
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(
		newAuthzCommand(),
		newCACommand(),
		newEnvoyCommand(),
		demo.Command(),
		newDevCommand(),
		newVersionCommand(),
	)
	return root
}
