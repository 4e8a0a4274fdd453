package kube_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/signet-mesh/signet/ca/kube"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// TestBusyIsNotAway: an API server that puts off requests is away when that has lasted
// for a minute, and not before.
func TestBusyIsNotAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := kube.Fed(&counting{}, (&published{}).fetch, "")
		busy, gone := apierrors.NewTooManyRequests("later", 1), errors.New("connection refused")
		says := func(want bool, err error) {
			t.Helper()
			c.Tried("pods", err)
			if got := c.Away(); got != want {
				t.Errorf("after %v away is %t", err, got)
			}
		}
		says(false, nil)
		says(true, gone)
		says(false, busy)
		time.Sleep(time.Minute - time.Nanosecond)
		says(false, busy)
		time.Sleep(time.Nanosecond)
		says(true, busy)
		says(false, nil)
		says(false, busy)
		c.Tried("nodes", gone)
		says(true, busy)
	})
}

// TestAViewIsStale from when the API server went until it has had the time to tell what
// happened meanwhile.
func TestAViewIsStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := kube.Fed(&counting{}, (&published{}).fetch, "")
		busy, gone := apierrors.NewTooManyRequests("later", 1), errors.New("connection refused")
		says := func(what string, want time.Time) {
			t.Helper()
			if got := c.Stale(); !got.Equal(want) {
				t.Errorf("%s: stale since %v, want %v", what, got, want)
			}
		}
		says("nothing happened", time.Time{})
		c.Tried("pods", busy)
		says("busy", time.Time{})
		c.Tried("pods", nil)
		says("busy no more", time.Time{})
		lost := time.Now()
		c.Tried("pods", gone)
		time.Sleep(time.Second)
		c.Tried("nodes", gone)
		says("away", lost)
		time.Sleep(20 * time.Minute)
		c.Tried("nodes", nil)
		time.Sleep(time.Minute)
		says("half of it back", lost)
		c.Tried("pods", busy)
		time.Sleep(15 * time.Second)
		says("back and busy", lost)
		c.Tried("pods", nil)
		says("back", lost)
		time.Sleep(10*time.Second - time.Nanosecond)
		says("not all told yet", lost)
		time.Sleep(time.Nanosecond)
		says("all told", time.Time{})
		// A moment's absence, of which nobody asked, too.
		lost = time.Now()
		c.Tried("pods", gone)
		time.Sleep(time.Second)
		c.Tried("pods", nil)
		time.Sleep(5 * time.Second)
		says("back after a moment", lost)
		time.Sleep(5 * time.Second)
		says("all told", time.Time{})
	})
}

// TestNamespacesThatWentAreForgotten: of the writes in them nothing is remembered.
func TestNamespacesThatWentAreForgotten(t *testing.T) {
	r := kube.NewRootCerts()
	s := r.Namespaces()
	ns := func(name string, deleting bool) *metav1.PartialObjectMetadata { return named("", name, name, deleting) }
	must(s.Replace([]any{ns("a", false), ns("b", false), ns("c", false)}, ""))
	for _, n := range []string{"a", "b", "c"} {
		r.Wrote(n)
	}
	if n := r.Written(); n != 3 {
		t.Fatalf("%d are remembered", n)
	}
	must(s.Delete(ns("a", false)))
	r.Wrote("a") // what was under way
	must(s.Update(ns("b", true)))
	if n := r.Written(); n != 1 {
		t.Errorf("%d are remembered", n)
	}
	must(s.Replace([]any{ns("d", false)}, ""))
	if n := r.Written(); n != 0 {
		t.Errorf("%d are remembered", n)
	}
	if err := s.Add("a string"); err == nil {
		t.Error("a string was taken for a namespace")
	}
}

// TestPoliciesDoNotWaitForEachOther: one that cannot be reported is tried again, ever
// more slowly, until it can be or is gone; the others are reported at once, and each
// in its newest version.
func TestPoliciesDoNotWaitForEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := kube.NewPolicies()
		policy := func(name string, generation int64) *unstructured.Unstructured {
			o := &unstructured.Unstructured{Object: map[string]any{}}
			o.SetNamespace("shop")
			o.SetName(name)
			o.SetGeneration(generation)
			return o
		}
		s := p.Store()
		began := time.Now()
		var mu sync.Mutex // guards what follows; a sleep in fake time orders nothing
		var done []string
		tries, works := map[string]int{}, false
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			p.Work(ctx, func(o *unstructured.Unstructured, attempt int) error {
				mu.Lock()
				defer mu.Unlock()
				tries[o.GetName()]++
				if (o.GetName() == "bad" || o.GetName() == "gone") && !works {
					return errors.New("refused")
				}
				done = append(done, fmt.Sprintf("%s %d after %v, attempt %d", o.GetName(), o.GetGeneration(), time.Since(began), attempt))
				return nil
			})
		}()
		must(s.Replace([]any{policy("gone", 1), policy("bad", 1), policy("a", 1), policy("b", 1)}, ""))
		synctest.Wait()
		must(s.Update(policy("a", 2)))
		synctest.Wait()
		mu.Lock()
		if want := []string{"a 1 after 0s, attempt 0", "b 1 after 0s, attempt 0", "a 2 after 0s, attempt 0"}; !slices.Equal(done, want) {
			t.Errorf("reported were %q, want %q", done, want)
		}
		mu.Unlock()
		must(s.Delete(policy("gone", 1)))
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		mu.Lock()
		if n := tries["bad"]; n < 10 || n > 20 {
			t.Errorf("a policy that cannot be reported was tried %d times in ten minutes", n)
		}
		if n := tries["gone"]; n != 1 {
			t.Errorf("one that is gone was tried %d times", n)
		}
		works = true
		mu.Unlock()
		time.Sleep(time.Minute)
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		if n := len(done); n != 4 || p.Waiting() != 0 {
			t.Errorf("at last %q were reported, and %d wait", done, p.Waiting())
		}
		cancel()
		<-ended
	})
}
