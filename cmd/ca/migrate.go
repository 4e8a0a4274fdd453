package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/replica"

	"github.com/spf13/cobra"
)

func newMigrateCommand() *cobra.Command {
	var path, to string
	c := &cobra.Command{Use: "migrate-store --to etcd|folder", Short: "Move state and issuance log between dataDir and etcd",
		Long: `Moves state and issuance log of an authority that is down from its dataDir to
the etcd that storage.etcd names, or, of the only replica, back. Nobody can use either
meanwhile. Everything is copied and compared before the place that it comes from is
marked as left; what was there stays, under another name. Run it again if it was
interrupted: it goes on where it was. Before the mark the authority can also go on
where it is. Keys stay where they are.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			c, err := loadConfig(path)
			if err != nil {
				return err
			}
			if !c.Storage.Etcd.enabled() {
				return errors.New("migrating the store: storage.etcd.endpoints is empty: name the etcd to move to or from")
			}
			cfg := ca.Config{}
			closeState, err := c.Storage.open(cmd.Context(), &cfg)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, closeState()) }()
			m := replica.Migration{Dir: filepath.Join(c.DataDir, ca.FolderName), Store: cfg.Shared.Store, Files: cfg.Shared.Files,
				Place: "etcd below " + c.Storage.Etcd.Prefix + " at " + strings.Join(c.Storage.Etcd.Endpoints, ", "), Wait: cfg.Shared.LogWait}
			var moved replica.Moved
			switch to {
			case "etcd":
				moved, err = m.ToShared(cmd.Context())
			case "folder":
				moved, err = m.ToFolder(cmd.Context())
			default:
				err = fmt.Errorf("migrating the store: --to %q: must be etcd or folder", to)
			}
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "moved instance %d to %s: %d entries, records up to %d in %d files, %d of them there already; compared\n",
				moved.Instance, to, moved.Entries, moved.Records, moved.Files, moved.Reused)
			return err
		}}
	c.Flags().StringVar(&path, "config", "/etc/signet/ca.yaml", "configuration `FILE`, with storage.etcd")
	c.Flags().StringVar(&to, "to", "", "where to: etcd or folder")
	_ = c.MarkFlagRequired("to") // fails only for a flag that is not there
	return c
}
