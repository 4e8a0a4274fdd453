package caclient_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/caclient"
	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/identity"

	"google.golang.org/grpc"
)

// TestABatchThatHasNoTimeLeavesTheOthersTheirs: all go over one stream.
func TestABatchThatHasNoTimeLeavesTheOthersTheirs(t *testing.T) {
	t.Parallel()
	s := &stub{}
	got, release := make(chan struct{}, 16), make(chan struct{})
	s.issue = func(st grpc.BidiStreamingServer[capb.IssueRequest, capb.IssueResponse]) error {
		ids := make(chan uint64, 16)
		go func() {
			defer close(ids)
			for {
				m, err := st.Recv()
				if err != nil {
					return
				}
				got <- struct{}{}
				ids <- m.GetId()
			}
		}()
		select {
		case <-release:
		case <-st.Context().Done():
			return st.Context().Err()
		}
		for id := range ids {
			if err := st.Send(answer(id)); err != nil {
				return err
			}
		}
		return nil
	}
	c, _ := run(t, s.start(t))
	ready(t, c)
	issue := func(ctx context.Context) error {
		_, err := c.Issue(ctx, []identity.Request{{PodUID: "uid"}})
		return err
	}
	first := make(chan error, 1)
	go func() { first <- issue(t.Context()) }()
	select {
	case <-got:
	case err := <-first:
		t.Fatalf("the first batch: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := issue(ctx); !errors.Is(err, caclient.ErrUnavailable) {
		t.Errorf("a batch that has no time: %v", err)
	}
	close(release)
	if err := <-first; err != nil {
		t.Errorf("another one had no time, and a batch that had: %v", err)
	}
	if err := issue(t.Context()); err != nil {
		t.Errorf("a batch after both: %v", err)
	}
}

func answer(id uint64) *capb.IssueResponse {
	return &capb.IssueResponse{Id: id, Results: []*capb.IssueResult{{Result: &capb.IssueResult_Refusal{Refusal: &capb.Refusal{Code: capb.Refusal_CODE_BUSY}}}}}
}

// TestAStreamOnWhichNobodyIsAnsweredIsLeft.
func TestAStreamOnWhichNobodyIsAnsweredIsLeft(t *testing.T) {
	t.Parallel()
	s := &stub{}
	streams := make(chan struct{}, 1)
	s.issue = func(st grpc.BidiStreamingServer[capb.IssueRequest, capb.IssueResponse]) error {
		select {
		case streams <- struct{}{}: // the first one is silent
			<-st.Context().Done()
			return nil
		default:
		}
		for {
			m, err := st.Recv()
			if err != nil {
				return nil
			}
			if err := st.Send(answer(m.GetId())); err != nil {
				return err
			}
		}
	}
	c, _ := run(t, s.start(t))
	ready(t, c)
	deadline := time.Now().Add(3 * time.Minute)
	for n := 0; ; n++ {
		// Each batch has less time than a stream needs to be called stuck.
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		_, err := c.Issue(ctx, []identity.Request{{PodUID: "uid"}})
		cancel()
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %d batches: %v", n, err)
		}
	}
}
