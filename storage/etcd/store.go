package etcd

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/signet-mesh/signet/storage"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// Options says how to reach a cluster. Only Endpoints is required.
type Options struct {
	// Endpoints are the members as https://HOST:PORT, or http:// where the network is
	// trusted; one scheme for all. Whichever answers is used.
	Endpoints []string
	// TLS is the client's side of https, with a certificate where the cluster asks for
	// one; nil means the system's authorities and none.
	TLS *tls.Config
	// Username and Password log in to a cluster that has authentication enabled.
	Username, Password string
	// Prefix is put before every key; it ends with a slash. Default "/signet/". Two
	// installations in a cluster have different ones, and neither begins with the other.
	Prefix string
	// Timeout is how long one request to one member may take. A call tries members for
	// three times as long before it fails. Default 3 s; at least 100 ms.
	Timeout time.Duration
	// Name is who holds what, for people who find a folder locked. Default "signet-ca".
	Name string
	// OwnerTTL is how long others wait for the folders of a process that died. Default
	// 10 s; at least 2 s.
	OwnerTTL time.Duration
	// MustExist makes a prefix without a store an error that wraps fs.ErrNotExist,
	// where the default is to begin an empty one.
	MustExist bool
	// Log receives the few things worth a line; nil discards them.
	Log *slog.Logger
	// Metrics registers signet_storage_*; nil registers none.
	Metrics prometheus.Registerer

	dial []grpc.DialOption // for tests
}

// Store is the storage.Store in an etcd cluster, for any number of processes. It is
// made by Open, and its Files hold logs.
type Store struct {
	client  *clientv3.Client
	members []string // endpoints
	prefix  string
	name    string
	timeout time.Duration
	ttl     time.Duration
	log     *slog.Logger
	metrics *metrics
	files   files

	// life ends with Close: what goes on between calls, keeping leases alive and asking
	// whether etcd answers, belongs to the store and not to a caller.
	life  context.Context
	stop  context.CancelCauseFunc
	tasks sync.WaitGroup

	// suspect has room for one: who had no answer puts something in, and members are
	// looked at.
	suspect chan struct{}

	// commits has room for those who may commit at the same time, each with a slot.
	commits chan struct{}
	// unsettled is the number of open slots, so that calls need not lock.
	unsettled atomic.Int64

	mu      sync.Mutex
	session *session        // that the slots live with; guarded by mu
	idle    []*slot         // of that session; guarded by mu
	open    []*slot         // with a commit of unknown outcome; guarded by mu
	leases  map[*lease]bool // held or waited for; guarded by mu
	away    error           // why etcd did not answer the last time; guarded by mu
}

var _ storage.Store = (*Store)(nil)

const (
	format     = 1
	maxCommits = 32

	defaultPrefix   = "/signet/"
	defaultTimeout  = 3 * time.Second
	defaultOwnerTTL = 10 * time.Second
	// attempts is how many times as long as one request a call may take.
	attempts = 3
)

// Open connects to a cluster and opens the store below a prefix, which is begun if
// there is none. It fails if the cluster does not answer in time.
func Open(ctx context.Context, opt Options) (*Store, error) {
	s, err := open(ctx, opt)
	if err != nil {
		return nil, fmt.Errorf("opening the store in etcd at %s: %w", strings.Join(opt.Endpoints, ", "), err)
	}
	return s, nil
}

func (o *Options) complete() error {
	if o.Prefix == "" {
		o.Prefix = defaultPrefix
	}
	if o.Timeout == 0 {
		o.Timeout = defaultTimeout
	}
	if o.OwnerTTL == 0 {
		o.OwnerTTL = defaultOwnerTTL
	}
	if o.Name == "" {
		o.Name = "signet-ca"
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	secure := 0
	for _, e := range o.Endpoints {
		switch {
		case strings.HasPrefix(e, "https://"):
			secure++
		case !strings.HasPrefix(e, "http://"):
			return fmt.Errorf("endpoint %q: must begin with https:// or http://", e)
		}
	}
	switch {
	case len(o.Endpoints) == 0:
		return errors.New("no endpoint given")
	case secure != 0 && secure != len(o.Endpoints):
		return errors.New("some endpoints are https and some are http: what is protected on some paths only is not protected")
	case secure == 0 && o.TLS != nil:
		return errors.New("TLS is configured, but the endpoints are http: make them https")
	case secure == 0 && o.Username != "":
		return errors.New("a password is configured, but the endpoints are http: it would be readable on the network; make them https")
	case !strings.HasSuffix(o.Prefix, "/"):
		return fmt.Errorf("prefix %q: must end with a slash", o.Prefix)
	case len(o.Prefix) > storage.MaxKey:
		return fmt.Errorf("prefix has %d bytes; at most %d are allowed", len(o.Prefix), storage.MaxKey)
	case o.Timeout < 100*time.Millisecond:
		return fmt.Errorf("timeout %v: must be at least 100ms", o.Timeout)
	case o.OwnerTTL < 2*time.Second:
		return fmt.Errorf("owner TTL %v: must be at least 2s", o.OwnerTTL)
	}
	if err := storage.CheckKey(o.Prefix); err != nil {
		return fmt.Errorf("prefix: %w", err)
	}
	if secure > 0 && o.TLS == nil {
		o.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	return nil
}

func open(ctx context.Context, opt Options) (*Store, error) {
	if err := opt.complete(); err != nil {
		return nil, err
	}
	s := &Store{prefix: opt.Prefix, name: opt.Name, timeout: opt.Timeout, ttl: opt.OwnerTTL, log: opt.Log,
		members: opt.Endpoints, suspect: make(chan struct{}, 1), commits: make(chan struct{}, maxCommits), leases: map[*lease]bool{}}
	s.files = files{s: s, owners: map[string]*owner{}, created: map[string]*file{}, left: map[string]int64{}}
	s.life, s.stop = context.WithCancelCause(context.Background())
	var err error
	s.client, err = clientv3.New(clientv3.Config{
		Endpoints: opt.Endpoints, TLS: opt.TLS, Username: opt.Username, Password: opt.Password,
		Context: s.life, DialTimeout: opt.Timeout,
		// A member that went away without a word is noticed by whoever waits for it.
		DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: opt.Timeout, PermitWithoutStream: true,
		Logger: zap.NewNop(), DialOptions: opt.dial,
	})
	if err != nil {
		s.stop(storage.ErrClosed)
		return nil, err
	}
	if err = s.begin(ctx, opt.MustExist); err == nil {
		s.metrics, err = newMetrics(opt.Metrics, s.gone)
	}
	if err != nil {
		s.stop(storage.ErrClosed)
		return nil, errors.Join(err, s.client.Close())
	}
	s.tasks.Go(s.probe)
	return s, nil
}

// Close ends watches and leases, gives up folders and disconnects. Only the first call
// does something.
func (s *Store) Close() error {
	if s.life.Err() != nil {
		return nil
	}
	s.mu.Lock()
	// So that nobody has to wait until they expire.
	sessions := s.files.sessions()
	for l := range s.leases {
		sessions = append(sessions, l.session)
	}
	if s.session != nil {
		sessions = append(sessions, s.session)
	}
	s.mu.Unlock()
	s.stop(storage.ErrClosed)
	var wg sync.WaitGroup
	for _, se := range sessions {
		wg.Go(func() { se.end(context.Background()) })
	}
	wg.Wait()
	s.tasks.Wait()
	s.metrics.unregister()
	if err := s.client.Close(); err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("closing the store in etcd: %w", err)
	}
	return nil
}

// Keys of etcd.
func (s *Store) formatKey() string           { return s.prefix + "format" }
func (s *Store) revisionKey() string         { return s.prefix + "revision" }
func (s *Store) entryKey(key string) string  { return s.prefix + "s/" + key }
func (s *Store) slotKey(id string) string    { return s.prefix + "w/" + id }
func (s *Store) leaseKey(name string) string { return s.prefix + "l/" + name }
func (s *Store) ownerKey(dir string) string  { return s.prefix + "o/" + dir }
func (s *Store) fileKey(name string) string  { return s.prefix + "f/" + name + "/" }
func (s *Store) userKey(kv *mvccpb.KeyValue) string {
	return strings.TrimPrefix(string(kv.Key), s.prefix+"s/")
}

// begin checks the format of what is below the prefix, or begins an empty store.
func (s *Store) begin(ctx context.Context, mustExist bool) error {
	want := fmt.Sprint(format)
	return s.try(ctx, func(ctx context.Context) error {
		then := []clientv3.Op{clientv3.OpPut(s.formatKey(), want), clientv3.OpPut(s.revisionKey(), "")}
		if mustExist {
			then = nil
		}
		resp, err := s.client.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(s.formatKey()), "=", 0)).
			Then(then...).Else(clientv3.OpGet(s.formatKey()), clientv3.OpGet(s.revisionKey())).Commit()
		if err != nil {
			return err
		}
		if resp.Succeeded {
			if mustExist {
				return final(fmt.Errorf("there is no store below %s: %w", s.prefix, errMissing))
			}
			s.log.Info("began an empty store", "prefix", s.prefix)
			return nil
		}
		found := resp.Responses[0].GetResponseRange().Kvs
		var version int
		if len(found) != 1 || len(resp.Responses[1].GetResponseRange().Kvs) != 1 {
			return final(fmt.Errorf("%s or %s is missing: %w", s.formatKey(), s.revisionKey(), storage.ErrCorrupt))
		}
		if _, err := fmt.Sscan(string(found[0].Value), &version); err != nil || version < 1 {
			return final(fmt.Errorf("%s holds %.20q: %w", s.formatKey(), found[0].Value, storage.ErrCorrupt))
		}
		if version > format {
			return final(fmt.Errorf("format %d, this version knows %d: %w", version, format, storage.ErrNewerFormat))
		}
		return nil
	})
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// entryCRC is over the key and the value: that somebody wrote below the prefix by hand
// is noticed where it is read.
func entryCRC(key string, value []byte) uint32 {
	return crc32.Update(crc32.Update(0, castagnoli, append([]byte(key), 0)), castagnoli, value)
}

func encodeEntry(key string, value []byte) string {
	return string(append(binary.BigEndian.AppendUint32(nil, entryCRC(key, value)), value...))
}

func (s *Store) parseEntry(kv *mvccpb.KeyValue) (storage.Entry, error) {
	e := storage.Entry{Key: s.userKey(kv), Revision: uint64(kv.ModRevision)}
	if len(kv.Value) < 4 || entryCRC(e.Key, kv.Value[4:]) != binary.BigEndian.Uint32(kv.Value) {
		return storage.Entry{}, fmt.Errorf("entry %q: wrong checksum: %w", e.Key, storage.ErrCorrupt)
	}
	e.Value = append([]byte{}, kv.Value[4:]...)
	return e, nil
}

// Get returns the entry of a key. See storage.Store.
func (s *Store) Get(ctx context.Context, key string) (e storage.Entry, err error) {
	if err = storage.CheckKey(key); err == nil {
		err = s.get(ctx, key, &e)
	}
	if err != nil {
		return storage.Entry{}, fmt.Errorf("reading %q from etcd: %w", key, err)
	}
	return e, nil
}

func (s *Store) get(ctx context.Context, key string, e *storage.Entry) error {
	if err := s.settle(ctx); err != nil {
		return err
	}
	return s.try(ctx, func(ctx context.Context) error {
		resp, err := s.client.Get(ctx, s.entryKey(key))
		if err != nil {
			return err
		}
		if len(resp.Kvs) == 0 {
			return final(storage.ErrNotFound)
		}
		*e, err = s.parseEntry(resp.Kvs[0])
		return final(err)
	})
}

// List returns the entries whose keys start with one of the prefixes. See storage.Store.
func (s *Store) List(ctx context.Context, prefixes ...string) (entries []storage.Entry, revision uint64, err error) {
	disjoint, err := storage.Prefixes(prefixes)
	if err == nil {
		err = s.settle(ctx)
	}
	if err == nil {
		err = s.try(ctx, func(ctx context.Context) (err error) {
			entries, revision, err = s.list(ctx, disjoint)
			return err
		})
	}
	if err != nil {
		return nil, 0, fmt.Errorf("listing %q in etcd: %w", prefixes, err)
	}
	return entries, revision, nil
}

// listPage is how many entries are asked for at once, so that an answer stays below
// what etcd sends at once whatever their size.
const listPage = 256

// list reads page by page as of the revision of the first ones, which one request asks
// for.
func (s *Store) list(ctx context.Context, prefixes []string) (entries []storage.Entry, revision uint64, err error) {
	first := []clientv3.Op{clientv3.OpGet(s.revisionKey())}
	for _, p := range prefixes {
		first = append(first, clientv3.OpGet(s.entryKey(p), clientv3.WithRange(clientv3.GetPrefixRangeEnd(s.entryKey(p))), clientv3.WithLimit(max(1, listPage/int64(len(prefixes))))))
	}
	resp, err := s.client.Txn(ctx).Then(first...).Commit()
	if err != nil {
		return nil, 0, err
	}
	if revision, err = s.parseRevision(resp.Responses[0].GetResponseRange().Kvs); err != nil {
		return nil, 0, err
	}
	for i, p := range prefixes {
		page := resp.Responses[i+1].GetResponseRange()
		kvs, more := page.Kvs, page.More
		for {
			for _, kv := range kvs {
				e, err := s.parseEntry(kv)
				if err != nil {
					return nil, 0, final(err)
				}
				entries = append(entries, e)
			}
			if !more {
				break
			}
			start, end := string(kvs[len(kvs)-1].Key)+"\x00", clientv3.GetPrefixRangeEnd(s.entryKey(p))
			next, err := s.client.Get(ctx, start, clientv3.WithRange(end), clientv3.WithLimit(listPage), clientv3.WithRev(resp.Header.Revision))
			if errors.Is(err, rpctypes.ErrCompacted) {
				return nil, 0, errors.New("compacted while it was read") // once more, from the start
			}
			if err != nil {
				return nil, 0, err
			}
			kvs, more = next.Kvs, next.More
		}
	}
	return entries, revision, nil
}

// parseRevision is the store's revision: that of the key that every commit writes.
func (s *Store) parseRevision(kvs []*mvccpb.KeyValue) (uint64, error) {
	if len(kvs) != 1 {
		return 0, final(fmt.Errorf("%s is missing: %w", s.revisionKey(), storage.ErrCorrupt))
	}
	return uint64(kvs[0].ModRevision), nil
}
