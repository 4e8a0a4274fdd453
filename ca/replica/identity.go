package replica

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/signet-mesh/signet/storage"
)

// identityName is the file, in the authority's folder, that says which replica it is of.
const identityName = "replica"

// Identity is what makes a folder a replica.
type Identity struct {
	Version int `json:"version"`
	// ID is what the replica claims its instance with.
	ID string `json:"id"`
	// Begun says that the replica has a part of the journal: it must be there from then on.
	Begun bool `json:"begun"`

	rest storage.Rest
}

// OpenIdentity reads the identity of a folder, and makes one if it has none.
func OpenIdentity(dir string) (i Identity, err error) {
	b, err := os.ReadFile(filepath.Join(dir, identityName))
	if errors.Is(err, fs.ErrNotExist) {
		i = Identity{Version: 1, ID: rand.Text()}
		return i, i.Save(dir)
	}
	if err == nil {
		i.rest, err = storage.ParseRecord(b, &i)
	}
	if err == nil && (i.Version != 1 || i.ID == "") {
		err = fmt.Errorf("version %d: %w", i.Version, storage.ErrNewerFormat)
	}
	if err != nil {
		return Identity{}, fmt.Errorf("reading the identity of the replica in %s: %w", dir, err)
	}
	return i, nil
}

// Save makes the identity that of a folder, durably and as one change.
func (i Identity) Save(dir string) error {
	b, err := storage.EncodeRecord(i, i.rest)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, identityName)
	w, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	if err = errors.Join(err, w.Sync(), w.Close()); err == nil {
		err = os.Rename(path+".new", path)
	}
	if err == nil {
		err = errors.Join(syncFolder(dir), syncFolder(filepath.Dir(dir)))
	}
	if err != nil {
		return fmt.Errorf("writing the identity of the replica in %s: %w", dir, err)
	}
	return nil
}

func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
