package ca

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/ca/keys"
	"github.com/signet-mesh/signet/ca/replica"
	"github.com/signet-mesh/signet/ca/revocation"
	"github.com/signet-mesh/signet/storage"

	"go.step.sm/crypto/kms/softkms"
)

// A backup is one file: state and logs, no keys. Integers are big-endian.
//
//	backup = "SIGNETBK" version(4) part*
//	part   = kind(1) length of name(2) length of data(8) name data
//
// First comes one part of kind 1, the description in JSON, then one of kind 2 for
// each entry of the store in the order of the keys, then one of kind 3 for each file
// of the logs, then one of kind 4: SHA-256 of all bytes before that part, and the
// log key's signature over a domain string and that hash. Nothing follows.
const (
	backupMagic   = "SIGNETBK"
	backupVersion = 1
	backupDomain  = "signet.ca.backup.v1\x00"

	partMeta  = 1
	partEntry = 2
	partFile  = 3
	partEnd   = 4

	partHeader = 1 + 2 + 8
	maxMeta    = 64 << 10
	maxEnd     = sha256.Size + 512
	// sequenceLeap is what a restore adds to the trust sequence: more than anybody
	// can have used since the backup.
	sequenceLeap = 1 << 20
)

// ErrBackup is why a backup is not restored: it is damaged, or not one.
var ErrBackup = errors.New("the backup cannot be used")

// backupFile matches the names of the files that a backup may have.
var backupFile = regexp.MustCompile(`^(log|retired/[0-9]{3})/([0-9]{12}\.seg|checkpoint)$`)

// BackupInfo describes a backup.
type BackupInfo struct {
	// Made is when.
	Made time.Time `json:"made"`
	// Version is that of the program that made it.
	Version     string `json:"version"`
	TrustDomain string `json:"trustDomain"`
	Instance    uint8  `json:"instance"`
	// TrustSequence is that of the trust bundle, LogSequence that of the last record.
	TrustSequence uint64 `json:"trustSequence"`
	LogSequence   uint64 `json:"logSequence"`
}

// backupWriter writes parts and keeps the hash of all of them.
type backupWriter struct {
	w   io.Writer
	sum hash.Hash
}

func (b *backupWriter) Write(p []byte) (int, error) {
	b.sum.Write(p)
	return b.w.Write(p)
}

func (b *backupWriter) part(kind byte, name string, size int64, data io.Reader) error {
	h := append(make([]byte, 0, partHeader+len(name)), kind)
	h = binary.BigEndian.AppendUint16(h, uint16(len(name)))
	h = binary.BigEndian.AppendUint64(h, uint64(size))
	if _, err := b.Write(append(h, name...)); err != nil {
		return err
	}
	n, err := io.Copy(b, data)
	if err == nil && n != size {
		err = fmt.Errorf("%s has %d bytes, not %d", name, n, size)
	}
	return err
}

// Backup writes a backup to w while the authority goes on. Every certificate that
// the state in it relies on has its record in the log in it: the state is read
// first, and what it relies on was recorded before.
func (a *Authority) Backup(ctx context.Context, w io.Writer) error {
	if err := a.backup(ctx, w); err != nil {
		return fmt.Errorf("backing up the authority: %w", err)
	}
	return nil
}

func (a *Authority) backup(ctx context.Context, w io.Writer) error {
	if err := a.signing(); err != nil {
		return err // of a log that lost records no backup may take the place of a good one
	}
	b, err := a.read(ctx)
	if err != nil {
		return err
	}
	return a.writeBackup(ctx, b, &backupWriter{w: w, sum: sha256.New()})
}

func (a *Authority) writeBackup(ctx context.Context, b book, out *backupWriter) error {
	if _, err := out.Write(binary.BigEndian.AppendUint32([]byte(backupMagic), backupVersion)); err != nil {
		return err
	}
	meta, err := json.Marshal(BackupInfo{Made: time.Now().UTC().Round(0), Version: a.cfg.Version, TrustDomain: b.journal.TrustDomain,
		Instance: b.journal.Instance, TrustSequence: b.journal.Sequence, LogSequence: a.log.Head().Sequence})
	if err != nil {
		return err
	}
	if err := out.part(partMeta, "backup", int64(len(meta)), bytes.NewReader(meta)); err != nil {
		return err
	}
	for _, e := range b.entries {
		if err := out.part(partEntry, e.Key, int64(len(e.Value)), bytes.NewReader(e.Value)); err != nil {
			return err
		}
	}
	for i, l := range b.logs {
		dir := logName
		if i < len(b.logs)-1 {
			dir = fmt.Sprintf("%s/%03d", retiredName, l.instance)
		}
		err := l.Files(ctx, func(name string, size int64, r io.Reader) error { return out.part(partFile, dir+"/"+name, size, r) })
		if err != nil {
			return err
		}
	}
	end := out.sum.Sum(nil)
	signature, err := a.signStatement(append([]byte(backupDomain), end...))
	if err != nil {
		return fmt.Errorf("signing it: %w", err)
	}
	end = append(end, signature...)
	return out.part(partEnd, "", int64(len(end)), bytes.NewReader(end))
}

// partReader reads the parts of a backup.
type partReader struct {
	r   io.Reader
	sum hash.Hash
}

// next reads the header of a part. For partEnd the hash is taken before it.
func (p *partReader) next() (kind byte, name string, size int64, before []byte, err error) {
	before = p.sum.Sum(nil)
	var h [partHeader]byte
	if _, err := io.ReadFull(p, h[:]); err != nil {
		return 0, "", 0, nil, fmt.Errorf("it ends too early: %w", err)
	}
	kind, size = h[0], int64(binary.BigEndian.Uint64(h[3:]))
	n := int(binary.BigEndian.Uint16(h[1:]))
	if size < 0 || n > storage.MaxKey {
		return 0, "", 0, nil, fmt.Errorf("a part with a name of %d bytes and %d bytes of data", n, size)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(p, b); err != nil {
		return 0, "", 0, nil, fmt.Errorf("it ends too early: %w", err)
	}
	return kind, string(b), size, before, nil
}

func (p *partReader) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	p.sum.Write(b[:n])
	return n, err
}

// data reads the data of a small part.
func (p *partReader) data(size, most int64) ([]byte, error) {
	if size > most {
		return nil, fmt.Errorf("a part of %d bytes, at most %d are allowed", size, most)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(p, b); err != nil {
		return nil, fmt.Errorf("it ends too early: %w", err)
	}
	return b, nil
}

// unpack writes the folder of a backed-up authority, without keys, to dir, which
// must not exist. On an error nothing of dir is to be used.
func unpack(ctx context.Context, r io.Reader, dir string) (BackupInfo, error) {
	info, err := unpackParts(ctx, &partReader{r: r, sum: sha256.New()}, dir)
	if err != nil {
		return BackupInfo{}, fmt.Errorf("%w: %w", ErrBackup, err)
	}
	return info, nil
}

func unpackParts(ctx context.Context, p *partReader, dir string) (info BackupInfo, err error) {
	start, err := p.data(int64(len(backupMagic)+4), 64)
	if err != nil {
		return info, err
	}
	if string(start[:len(backupMagic)]) != backupMagic {
		return info, errors.New("it is not a backup of signet-ca")
	}
	if v := binary.BigEndian.Uint32(start[len(backupMagic):]); v > backupVersion || v < 1 {
		return info, fmt.Errorf("%w: format %d, this version knows %d", storage.ErrNewerFormat, v, backupVersion)
	}
	kind, _, size, _, err := p.next()
	if err != nil {
		return info, err
	}
	meta, err := p.data(size, maxMeta)
	if err != nil {
		return info, err
	}
	if err := json.Unmarshal(meta, &info); err != nil || kind != partMeta {
		return info, fmt.Errorf("its description cannot be read: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(dir, logName), 0o700); err != nil {
		return info, err
	}
	store, err := storage.OpenBolt(filepath.Join(dir, stateName), storage.BoltOptions{})
	if err != nil {
		return info, err
	}
	u := unpacker{dir: dir, store: store, info: info}
	err = u.parts(ctx, p)
	return info, errors.Join(err, store.Close())
}

// unpacker takes the parts after the description.
type unpacker struct {
	dir     string
	store   *storage.Bolt
	info    BackupInfo
	journal journal.Journal
	lastKey string
	files   map[string]bool
	ops     []storage.Op // entries that are not in the store yet
	size    int          // of ops
}

func (u *unpacker) parts(ctx context.Context, p *partReader) error {
	u.files = map[string]bool{}
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		kind, name, size, before, err := p.next()
		if err != nil {
			return err
		}
		switch kind {
		case partEntry:
			err = u.entry(ctx, p, name, size)
		case partFile:
			if err = u.flush(ctx); err == nil {
				err = u.file(p, name, size)
			}
		case partEnd:
			return errors.Join(u.flush(ctx), u.end(p, name, size, before))
		default:
			err = fmt.Errorf("a part of kind %d", kind)
		}
		if err != nil {
			return err
		}
	}
}

func (u *unpacker) entry(ctx context.Context, p *partReader, key string, size int64) error {
	value, err := p.data(size, storage.MaxValue)
	if err != nil {
		return err
	}
	if len(u.files) > 0 || key <= u.lastKey {
		return fmt.Errorf("entry %.60q is out of order", key)
	}
	u.lastKey = key
	if key == journal.Key {
		if u.journal, err = journal.Parse(value); err != nil {
			return err
		}
		if j := u.journal; j.TrustDomain != u.info.TrustDomain || j.Instance != u.info.Instance || j.Sequence != u.info.TrustSequence {
			return errors.New("its description is of another authority than its journal")
		}
	}
	if n := len(key) + len(value); len(u.ops) == storage.MaxOps || u.size+n > storage.MaxCommit {
		if err := u.flush(ctx); err != nil {
			return err
		}
	}
	u.ops, u.size = append(u.ops, storage.Op{Key: key, Value: value}), u.size+len(key)+len(value)
	return nil
}

func (u *unpacker) flush(ctx context.Context) error {
	if len(u.ops) == 0 {
		return nil
	}
	_, err := u.store.Commit(ctx, nil, u.ops)
	u.ops, u.size = nil, 0
	return err
}

func (u *unpacker) file(p *partReader, name string, size int64) (err error) {
	if !backupFile.MatchString(name) || u.files[name] {
		return fmt.Errorf("a file %.60q that does not belong there", name)
	}
	u.files[name] = true
	path := filepath.Join(u.dir, filepath.FromSlash(name))
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if _, err = io.CopyN(f, p, size); errors.Is(err, io.EOF) {
		err = fmt.Errorf("it ends within %s", name)
	}
	return errors.Join(err, f.Sync(), f.Close())
}

func (u *unpacker) end(p *partReader, name string, size int64, before []byte) error {
	end, err := p.data(size, maxEnd)
	if err != nil {
		return err
	}
	if name != "" || len(end) < sha256.Size || !bytes.Equal(end[:sha256.Size], before) {
		return errors.New("it is damaged: its hash does not match")
	}
	if u.journal.Version == 0 {
		return errors.New("it has no journal")
	}
	if !verifyStatement(u.journal.LogPublicKey, append([]byte(backupDomain), before...), end[sha256.Size:]) {
		return errors.New("it is not signed by the authority that it is of")
	}
	if n, err := p.r.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		return errors.New("something follows its end")
	}
	return nil
}

// VerifyBackup unpacks a backup into the folder dir, which must not exist, checks it
// as Verify with store does, and removes the folder.
func VerifyBackup(ctx context.Context, r io.Reader, dir string) (info BackupInfo, resp *capb.VerifyResponse, err error) {
	defer func() {
		if err = errors.Join(err, os.RemoveAll(dir)); err != nil {
			info, resp, err = BackupInfo{}, nil, fmt.Errorf("verifying a backup: %w", err)
		}
	}()
	if err := os.Mkdir(dir, 0o700); err != nil {
		return info, nil, err
	}
	if info, err = unpack(ctx, r, filepath.Join(dir, FolderName)); err != nil {
		return info, nil, err
	}
	resp, err = verifyFolder(ctx, filepath.Join(dir, FolderName))
	return info, resp, err
}

func verifyFolder(ctx context.Context, dir string) (*capb.VerifyResponse, error) {
	f, err := openFolder(dir)
	if err != nil {
		return nil, err
	}
	resp, err := f.Verify(ctx, nil, true)
	return resp, errors.Join(err, f.Close())
}

// RestoreConfig says what to restore and where.
type RestoreConfig struct {
	// Backup is read once.
	Backup io.Reader
	// DataDir must exist, and hold no authority.
	DataDir string
	// KeysDir holds the key files that the journal names; they are copied. It may be
	// empty if the journal names none.
	KeysDir string
	// PassphraseFile is what those files are encrypted with, if they are.
	PassphraseFile string
	// Instance is the new one; 0 takes the lowest that was never used.
	Instance uint8
}

// Restored is what a restore made.
type Restored struct {
	// Info describes the backup.
	Info BackupInfo
	// Instance and TrustSequence are the new ones.
	Instance      uint8
	TrustSequence uint64
}

// Restore makes an authority in cfg.DataDir from a backup and the keys, which no
// backup has. It takes a new instance, so that no serial that was given out since
// the backup can come again, and a trust sequence beyond all that agents can have
// seen; the log of the instance before is kept to be read. All is checked before the
// authority is there, under its name and complete; after an error nothing is.
func Restore(ctx context.Context, cfg RestoreConfig) (Restored, error) {
	out, err := restore(ctx, cfg)
	if err != nil {
		return Restored{}, fmt.Errorf("restoring the authority to %s: %w", cfg.DataDir, err)
	}
	return out, nil
}

func restore(ctx context.Context, cfg RestoreConfig) (out Restored, err error) {
	dir := filepath.Join(cfg.DataDir, FolderName)
	if _, err := os.Lstat(dir); err == nil {
		return out, fmt.Errorf("%s exists: a restore replaces nothing; move it away first", dir)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return out, err
	}
	tmp := dir + ".restoring"
	if err := os.RemoveAll(tmp); err != nil { // of a restore that did not end
		return out, err
	}
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return out, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(tmp))
		}
	}()
	if out.Info, err = unpack(ctx, cfg.Backup, tmp); err != nil {
		return out, err
	}
	resp, err := verifyFolder(ctx, tmp)
	if err != nil {
		return out, err
	}
	if len(resp.GetProblems()) > 0 {
		return out, fmt.Errorf("%w: %s", ErrBackup, strings.Join(resp.GetProblems(), "; "))
	}
	if err := out.renew(ctx, tmp, cfg); err != nil {
		return out, err
	}
	for _, d := range []string{filepath.Join(tmp, keysName), filepath.Join(tmp, retiredName), tmp} {
		if err := keys.SyncFolder(d); err != nil {
			return out, err
		}
	}
	if err := os.Rename(tmp, dir); err != nil {
		return out, err
	}
	return out, keys.SyncFolder(cfg.DataDir)
}

// renew makes a new instance of what was unpacked in dir.
func (out *Restored) renew(ctx context.Context, dir string, cfg RestoreConfig) (err error) {
	store, err := storage.OpenBolt(filepath.Join(dir, stateName), storage.BoltOptions{MustExist: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	j, revision, err := journal.Load(ctx, store)
	if err != nil {
		return err
	}
	entries, _, err := store.List(ctx, "")
	if err != nil {
		return err
	}
	if out.Instance, err = newInstance(cfg.Instance, j, entries); err != nil {
		return err
	}
	ring, err := takeKeys(j, cfg, filepath.Join(dir, keysName))
	if err != nil {
		return err
	}
	// The old log is at rest; it gets its folder, and a new one begins.
	old, err := storage.OpenLog(filepath.Join(dir, logName), storage.LogOptions{Instance: uint32(j.Instance), ReadOnly: true})
	if err != nil {
		return err
	}
	head := old.Head()
	if err := old.Close(); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, retiredName), 0o700); err != nil {
		return err
	}
	if err := os.Rename(filepath.Join(dir, logName), retiredDir(dir, j.Instance)); err != nil {
		return err
	}
	r, err := json.Marshal(retired{Version: retiredVersion, Instance: j.Instance, LogPublicKey: j.LogPublicKey,
		Sequence: head.Sequence, Hash: head.Hash[:], Retired: time.Now().UTC().Round(0)})
	if err != nil {
		return err
	}
	ops := []storage.Op{{Key: retiredKey(j.Instance), Value: r}, {Key: lossKey, Delete: true}}
	clock, err := renewClock(entries)
	if err != nil {
		return err
	}
	ops = append(ops, clock...)
	var lists []storage.Op
	for _, e := range entries {
		if e.Key == replica.BanRevisionKey {
			r, err := replica.ParseBanRevision(e)
			if err != nil {
				return err
			}
			r.Restore(j.Sequence+sequenceLeap, time.Now().UTC().Round(0))
			value, err := r.Encode()
			if err != nil {
				return err
			}
			ops = append(ops, storage.Op{Key: e.Key, Value: value})
		}
		// Their numbers may have been used for others since; the next ones are far above.
		if strings.HasPrefix(e.Key, revocation.ListPrefix) {
			lists = append(lists, storage.Op{Key: e.Key, Delete: true})
		}
	}
	// Of many replicas there are more than fit into one commit.
	for part := range storage.Parts(lists) {
		if _, err := store.Commit(ctx, nil, part); err != nil {
			return err
		}
	}
	j.Instance, j.Sequence = out.Instance, j.Sequence+sequenceLeap
	j.Others = nil // it is one authority, whatever there was beside it
	out.TrustSequence = j.Sequence
	logKey, err := newLogKey(ring, &j)
	if err != nil {
		return err
	}
	b, err := json.Marshal(j)
	if err != nil {
		return err
	}
	if _, err := store.Commit(ctx, []storage.Cond{{Key: journal.Key, Revision: revision}}, append(ops, storage.Op{Key: journal.Key, Value: b})); err != nil {
		return err
	}
	log, err := storage.OpenLog(filepath.Join(dir, logName), storage.LogOptions{Instance: uint32(j.Instance)})
	if err != nil {
		return err
	}
	a := &Authority{log: log, logKey: logKey, instance: j.Instance}
	err = a.decide(ctx, &capb.Decision{What: capb.Decision_WHAT_RESTORED, Instance: head.Instance, Sequence: head.Sequence, Hash: head.Hash[:],
		Reason: "restored from a backup of " + out.Info.Made.Format(time.RFC3339)})
	if err == nil {
		err = a.signHead(ctx)
	}
	return errors.Join(err, log.Close())
}

// newInstance is the instance that a restored authority takes.
func newInstance(wanted uint8, j journal.Journal, entries []storage.Entry) (uint8, error) {
	used := []uint8{j.Instance}
	for _, e := range entries {
		if strings.HasPrefix(e.Key, instancePrefix) {
			r, err := parseRetired(e)
			if err != nil {
				return 0, err
			}
			used = append(used, r.Instance)
		}
	}
	// Those of other replicas, where the state was shared: they may go on, and the serials
	// that they gave out are valid in any case.
	for n := range j.Others {
		i, err := strconv.ParseUint(n, 10, 7)
		if err != nil {
			return 0, fmt.Errorf("journal: replica %q: %w", n, err)
		}
		used = append(used, uint8(i))
	}
	slices.Sort(used)
	if wanted > storage.MaxInstance {
		return 0, fmt.Errorf("instance %d: must be 1 to %d", wanted, storage.MaxInstance)
	}
	if wanted != 0 {
		if slices.Contains(used, wanted) {
			return 0, fmt.Errorf("instance %d was used before: serials that it gave out could come again; choose another than %v", wanted, used)
		}
		return wanted, nil
	}
	for i := uint8(1); i <= storage.MaxInstance; i++ {
		if !slices.Contains(used, i) {
			return i, nil
		}
	}
	return 0, errors.New("every instance has been used")
}

// takeKeys copies the key files that a journal names, and checks that each is the
// key of its certificate.
func takeKeys(j journal.Journal, cfg RestoreConfig, to string) (*keys.Ring, error) {
	if err := os.Mkdir(to, 0o700); err != nil {
		return nil, err
	}
	source, err := keys.Open(keys.Config{Folder: cfg.KeysDir, PassphraseFile: cfg.PassphraseFile})
	if err != nil {
		return nil, err
	}
	ring, err := keys.Open(keys.Config{Folder: to, PassphraseFile: cfg.PassphraseFile})
	if err != nil {
		return nil, err
	}
	for _, e := range j.Authorities {
		if !strings.HasPrefix(e.Key, softkms.Scheme+":") {
			continue // in a device, where it stays, or with somebody else
		}
		if cfg.KeysDir == "" {
			return nil, fmt.Errorf("a backup has no keys, and the %s needs %s: say where the key files are", e.Kind, e.Key)
		}
		pub, err := e.Public()
		if err != nil {
			return nil, err
		}
		if err := ring.Copy(source, e.Key, pub); err != nil {
			if e.State == journal.StateOld {
				continue // it signs nothing anymore
			}
			return nil, fmt.Errorf("the key of the %s: %w", e.Kind, err)
		}
	}
	return ring, nil
}
