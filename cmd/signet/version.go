package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/signet-mesh/signet/cmd/internal/version"
)

func newVersionCommand() *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:   "version",
		Short: "Print the version of this program",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			v := version.Current()
			switch output {
			case "text":
				_, err := fmt.Fprintln(c.OutOrStdout(), "signet", v)
				return err
			case "json":
				return json.NewEncoder(c.OutOrStdout()).Encode(v)
			}
			return fmt.Errorf("--output: %q is not text or json", output)
		},
	}
	c.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return c
}
