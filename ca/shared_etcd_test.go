package ca_test

import (
	"flag"
	"fmt"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/integration/etcdtest"
	"github.com/signet-mesh/signet/storage/etcd"
)

var everyCommit = flag.Bool("every-commit", false, "let each commit of two replicas on etcd end without an answer, and not three of them")

// etcdState is a state below a prefix of a real cluster, as one process of a replica has it.
func etcdState(t *testing.T, c *etcdtest.Cluster, prefix string) ca.Shared {
	t.Helper()
	s, err := etcd.Open(t.Context(), etcd.Options{Endpoints: c.Endpoints(), Prefix: prefix, Timeout: 10 * time.Second, OwnerTTL: 20 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return ca.Shared{Store: s, Files: s.Files(), LogWait: time.Minute}
}

// TestReplicasUnderLostAnswersOfEtcd is TestReplicasUnderLostAnswers on a real etcd and in
// real time: some of the commits, with -every-commit all.
func TestReplicasUnderLostAnswersOfEtcd(t *testing.T) {
	t.Parallel()
	cluster := etcdtest.Start(t, etcdtest.Options{})
	hits := map[string]int{}
	for n := range 14 {
		for _, landed := range []bool{false, true} {
			// Of those one of the revocation, of the request and of the rotation.
			if short := n == 0 && landed || n == 3 && !landed || n == 6 && landed; !short && !*everyCommit {
				continue
			}
			t.Run(fmt.Sprint("commit ", n, ", landed ", landed), func(t *testing.T) {
				hits[underALostAnswer(t, etcdState(t, cluster, fmt.Sprintf("/%d-%v/", n, landed)), time.Minute, n, landed)]++
			})
		}
	}
	t.Logf("note: commits that had no answer: %v", hits)
}
