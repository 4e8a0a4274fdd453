package main

import (
	"context"
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
			c, state, closeState, err := openEtcd(cmd.Context(), path, "migrating the store: storage.etcd.endpoints is empty: name the etcd to move to or from")
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, closeState()) }()
			m := replica.Migration{Dir: filepath.Join(c.DataDir, ca.FolderName), Store: state.Store, Files: state.Files,
				Place: "etcd below " + c.Storage.Etcd.Prefix + " at " + strings.Join(c.Storage.Etcd.Endpoints, ", "), Wait: state.LogWait}
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

func newRestoreEtcdCommand() *cobra.Command {
	var path, reason string
	var from uint8
	c := &cobra.Command{Use: "restore-etcd --reason TEXT", Short: "Go on with an etcd that was restored from a snapshot",
		Long: `Makes the state in an etcd that was restored from an older snapshot one that
replicas can go on with. Every replica must be down. What was recorded since the
snapshot is gone: each replica becomes another instance, so that no serial can come
twice, its new log begins with a record of that, and the trust sequence is raised
beyond all that agents have seen. The logs of before stay, to be read. All is checked
first, and done as one change. Then set instance and authority.rootReplica in the
configurations to what is printed, and start the replicas.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			_, state, closeState, err := openEtcd(cmd.Context(), path, "going on with a restored etcd: storage.etcd.endpoints is empty: name its members")
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, closeState()) }()
			r, err := replica.Restoration{Store: state.Store, Files: state.Files, Wait: state.LogWait, From: from, Reason: reason}.Run(cmd.Context())
			if err != nil {
				return err
			}
			out := fmt.Sprintf("trust sequence: %d\n", r.TrustSequence)
			for _, x := range r.Replicas {
				out += fmt.Sprintf("instance: %d, which was %d, with records up to %d\n", x.To, x.From, x.Records)
			}
			out += fmt.Sprintf("bans in force: %d; what was banned or lifted since the snapshot is not among them\n", r.Bans)
			_, err = fmt.Fprint(cmd.OutOrStdout(), out)
			return err
		}}
	c.Flags().StringVar(&path, "config", "/etc/signet/ca.yaml", "configuration `FILE` of any replica, with storage.etcd")
	c.Flags().StringVar(&reason, "reason", "", "why, for those who read the logs later")
	c.Flags().Uint8Var(&from, "instances-from", 0, "the lowest instance to give; those below it are never given to anybody. Set it above all that replicas had which joined since the snapshot; 0 takes the lowest that the snapshot does not know")
	_ = c.MarkFlagRequired("reason") // fails only for a flag that is not there
	return c
}

// openEtcd opens the etcd that a configuration names, which must; refusal says that it
// does not.
func openEtcd(ctx context.Context, path, refusal string) (c config, state ca.Shared, closeState func() error, err error) {
	if c, err = loadConfig(path); err != nil {
		return c, state, nil, err
	}
	if !c.Storage.Etcd.enabled() {
		return c, state, nil, errors.New(refusal)
	}
	var cfg ca.Config
	closeState, err = c.Storage.open(ctx, &cfg)
	return c, cfg.Shared, closeState, err
}
