package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/cmd/internal/issuancelog"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// place says where the authority is: a folder or the configuration that names it.
type place struct{ config, dataDir string }

func (p *place) flags(c *cobra.Command) {
	c.Flags().StringVar(&p.config, "config", "/etc/signet/ca.yaml", "configuration `FILE`, for its dataDir and adminSocket")
	c.Flags().StringVar(&p.dataDir, "data-dir", "", "the dataDir, instead of a configuration")
}

// find is the folder of data and the socket for operators.
func (p *place) find() (dataDir, socket string, err error) {
	if p.dataDir != "" {
		return p.dataDir, filepath.Join(p.dataDir, "admin.sock"), nil
	}
	c, err := loadConfig(p.config)
	if err != nil {
		return "", "", err
	}
	return c.DataDir, c.AdminSocket, nil
}

// newStoreCommands are what an operator does with log and state, all but backup
// while the authority is down: log, backup, restore, verify-store, migrate-store, restore-etcd.
func newStoreCommands() []*cobra.Command {
	var p place
	log := &cobra.Command{Use: "log", Short: "Read the issuance log of an authority that is down",
		Long: "Reads the issuance log as it lies in the folder, and changes nothing. While the\nauthority runs use: signet ca log", Args: cobra.NoArgs}
	log.AddCommand(issuancelog.Commands(func(context.Context) (issuancelog.Source, error) {
		dir, _, err := p.find()
		if err != nil {
			return nil, err
		}
		f, err := ca.OpenFolder(dir)
		if err != nil {
			return nil, err
		}
		return folder{f}, nil
	})...)
	for _, c := range log.Commands() {
		p.flags(c)
	}
	return []*cobra.Command{log, newBackupCommand(), newRestoreCommand(), newVerifyStoreCommand(), newMigrateCommand(), newRestoreEtcdCommand()}
}

// folder is a ca.Folder as a source.
type folder struct{ *ca.Folder }

func (f folder) Head(context.Context) (*capb.LogHead, error) {
	h, _ := f.Folder.Head()
	return h, nil
}

func newBackupCommand() *cobra.Command {
	var p place
	var out string
	c := &cobra.Command{Use: "backup --out FILE", Short: "Back up state and issuance log of the authority that runs",
		Long: `Asks the running authority for a backup, checks it as verify-store does, and
puts it under its name only then. It holds no keys: keep those apart.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, socket, err := p.find()
			if err != nil {
				return err
			}
			info, err := backup(cmd.Context(), socket, out)
			if err != nil {
				return fmt.Errorf("backing up: %w", err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: instance %d of %s, trust sequence %d, records up to %d; verified\n",
				out, info.Instance, info.TrustDomain, info.TrustSequence, info.LogSequence)
			return err
		}}
	p.flags(c)
	c.Flags().StringVar(&out, "out", "", "`FILE` to write; it must not exist")
	_ = c.MarkFlagRequired("out") // fails only for a flag that is not there
	return c
}

func backup(ctx context.Context, socket, out string) (info ca.BackupInfo, err error) {
	if _, err := os.Lstat(out); err == nil {
		return info, fmt.Errorf("%s exists; choose another name", out)
	}
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return info, err
	}
	defer conn.Close()
	stream, err := capb.NewAdminClient(conn).Backup(ctx, &capb.BackupRequest{})
	if err != nil {
		return info, asking(socket, err)
	}
	f, err := os.CreateTemp(filepath.Dir(out), "."+filepath.Base(out)+".*") // 0600
	if err != nil {
		return info, err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		// After the link both names are the same file.
		if removeErr := os.Remove(f.Name()); !errors.Is(removeErr, fs.ErrNotExist) {
			err = errors.Join(err, removeErr)
		}
	}()
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return info, asking(socket, err)
		}
		if _, err := f.Write(m.GetData()); err != nil {
			return info, err
		}
	}
	if err := f.Sync(); err != nil {
		return info, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return info, err
	}
	info, v, err := ca.VerifyBackup(ctx, f, f.Name()+".unpacked")
	if err != nil {
		return info, err
	}
	if len(v.GetProblems()) > 0 {
		return info, fmt.Errorf("the authority's own store has problems: run signet ca log verify: %s", v.GetProblems()[0])
	}
	// A link does not replace what came meanwhile.
	return info, os.Link(f.Name(), out)
}

// asking explains why the authority did not answer.
func asking(socket string, err error) error {
	if status.Code(err) == codes.Unavailable {
		return fmt.Errorf("asking the authority at %s: %w (is it running? only its owner may ask)", socket, err)
	}
	return fmt.Errorf("asking the authority at %s: %w", socket, err)
}

func newRestoreCommand() *cobra.Command {
	var p place
	var from, keys, passphrase string
	var instance uint8
	c := &cobra.Command{Use: "restore --from FILE --keys DIR", Short: "Make an authority from a backup and its keys",
		Long: `Makes an authority in the dataDir, which must hold none, from a backup and the
key files that it names. It is another instance than the one that was backed up,
so that no serial can come twice, and its trust sequence is raised. Everything is
checked first; after an error nothing is there. Then set instance in the
configuration to what is printed, and start it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, _, err := p.find()
			if err != nil {
				return err
			}
			f, err := os.Open(from)
			if err != nil {
				return fmt.Errorf("restoring: %w", err)
			}
			defer f.Close()
			r, err := ca.Restore(cmd.Context(), ca.RestoreConfig{Backup: f, DataDir: dir, KeysDir: keys, PassphraseFile: passphrase, Instance: instance})
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "restored instance %d of %s from a backup of %s\ninstance: %d\ntrust sequence: %d\n",
				r.Info.Instance, r.Info.TrustDomain, r.Info.Made.Format("2006-01-02T15:04:05Z07:00"), r.Instance, r.TrustSequence)
			return err
		}}
	p.flags(c)
	c.Flags().StringVar(&from, "from", "", "backup `FILE`")
	c.Flags().StringVar(&keys, "keys", "", "`DIR` with the key files")
	c.Flags().StringVar(&passphrase, "passphrase-file", "", "`FILE` with the passphrase of the key files, if they have one")
	c.Flags().Uint8Var(&instance, "instance", 0, "the new instance; 0 takes the lowest that was never used")
	_ = c.MarkFlagRequired("from") // fails only for a flag that is not there
	return c
}

func newVerifyStoreCommand() *cobra.Command {
	var p place
	var backup, output string
	c := &cobra.Command{Use: "verify-store", Short: "Check every invariant of state and issuance log, of an authority that is down or of a backup",
		Long: `Checks the state and the issuance log as they lie in the folder, or in a backup,
and that everything the state relies on was recorded. Nothing is changed, and no
key is needed. While the authority runs use: signet ca log verify --store`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v, err := verifyStore(cmd.Context(), p, backup)
			if err != nil {
				return err
			}
			return issuancelog.Report(cmd.OutOrStdout(), v, output)
		}}
	p.flags(c)
	c.Flags().StringVar(&backup, "backup", "", "check this backup `FILE` instead; it is unpacked beside it for as long as that takes")
	c.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return c
}

func verifyStore(ctx context.Context, p place, backup string) (*capb.VerifyResponse, error) {
	if backup != "" {
		f, err := os.Open(backup)
		if err != nil {
			return nil, fmt.Errorf("verifying a backup: %w", err)
		}
		defer f.Close()
		dir, err := os.MkdirTemp(filepath.Dir(backup), "."+filepath.Base(backup)+".*")
		if err != nil {
			return nil, fmt.Errorf("verifying a backup: %w", err)
		}
		_, v, err := ca.VerifyBackup(ctx, f, filepath.Join(dir, "unpacked"))
		return v, errors.Join(err, os.Remove(dir))
	}
	dir, _, err := p.find()
	if err != nil {
		return nil, err
	}
	f, err := ca.OpenFolder(dir)
	if err != nil {
		return nil, err
	}
	v, err := f.Verify(ctx, nil, true)
	return v, errors.Join(err, f.Close())
}
