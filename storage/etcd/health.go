package etcd

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/signet-mesh/signet/storage"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// probeEvery is how often a store looks whether etcd answers.
	probeEvery = 2 * time.Second
	// lookEvery is how often it looks at each member after a request without an answer.
	lookEvery = 300 * time.Millisecond
)

// Err is nil while etcd answers and has space, else the reason why not. It says nothing
// about the next call.
func (s *Store) Err() error {
	if s.life.Err() != nil {
		return storage.ErrClosed
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if errors.Is(s.away, errFull) {
		return fmt.Errorf("nothing can be recorded: %w", s.away)
	}
	if s.away != nil {
		return fmt.Errorf("etcd does not answer; nothing can be recorded: %w", s.away)
	}
	return nil
}

func (s *Store) gone() bool { return s.Err() != nil }

// probe asks etcd whether it answers, until Close, and after a request without an answer
// which members know a leader: the client would go on to ask the others in turn.
func (s *Store) probe() {
	t := time.NewTicker(probeEvery)
	defer t.Stop()
	used := s.members
	for {
		select {
		case <-s.life.Done():
			return
		case <-s.suspect:
			used = s.use(used)
			// Not more often than that, whatever fails meanwhile.
			if s.sleep(s.life, lookEvery) != nil {
				return
			}
			continue
		case <-t.C:
		}
		if len(used) < len(s.members) {
			used = s.use(used)
		}
		ctx, cancel := context.WithTimeout(s.life, s.timeout)
		_, err := s.client.Get(clientv3.WithRequireLeader(ctx), s.revisionKey(), clientv3.WithKeysOnly())
		cancel()
		if err == nil {
			err = s.full(used)
		}
		if s.life.Err() != nil {
			return
		}
		s.mu.Lock()
		before := s.away
		s.away = err
		s.mu.Unlock()
		full := errors.Is(err, errFull)
		switch {
		case full && !errors.Is(before, errFull):
			s.log.Error("etcd is full; nothing can be recorded, and so nothing issued, until it has space again", "err", err)
		case err != nil && before == nil:
			s.log.Error("etcd does not answer; nothing can be recorded, and so nothing issued, until it does", "err", err)
		case err == nil && before != nil:
			s.log.Info("etcd answers and takes records again")
		}
		if err != nil && !full {
			s.suspicious()
		}
	}
}

// full is an error if the cluster's alarm says that it has no space. A member that does
// not answer says nothing: who writes hears of it.
func (s *Store) full(members []string) error {
	for _, m := range members {
		ctx, cancel := context.WithTimeout(s.life, s.timeout)
		status, err := s.client.Status(ctx, m)
		cancel()
		if err != nil {
			continue
		}
		if slices.ContainsFunc(status.Errors, noSpace) {
			return errFull
		}
		return nil
	}
	return nil
}

// noSpace reports whether what a member says of itself is that alarm.
func noSpace(e string) bool { return strings.Contains(e, "alarm:NOSPACE") }

// suspicious has the members looked at.
func (s *Store) suspicious() {
	select {
	case s.suspect <- struct{}{}:
	default:
	}
}

// use looks which members know a leader and has the client use those, or all if none
// does. It returns what is used.
func (s *Store) use(before []string) []string {
	if len(s.members) == 1 {
		return s.members
	}
	ctx, cancel := context.WithTimeout(s.life, s.timeout)
	defer cancel()
	good := make([]string, len(s.members))
	var wg sync.WaitGroup
	for i, m := range s.members {
		wg.Go(func() {
			if status, err := s.client.Status(ctx, m); err == nil && status.Leader != 0 && !slices.ContainsFunc(status.Errors, func(e string) bool { return !noSpace(e) }) {
				good[i] = m
			}
		})
	}
	wg.Wait()
	good = slices.DeleteFunc(good, func(m string) bool { return m == "" })
	if len(good) == 0 {
		good = s.members
	}
	if s.life.Err() == nil && !slices.Equal(good, before) {
		s.client.SetEndpoints(good...)
		s.log.Info("the members of etcd that know a leader are used", "endpoints", good)
	}
	return good
}
