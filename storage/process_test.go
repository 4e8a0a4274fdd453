package storage_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/integration/leaktest"
	"github.com/signet-mesh/signet/storage"
	"github.com/signet-mesh/signet/storage/storagetest"
)

// childEnv makes the test binary do a child's work instead of running tests.
const childEnv = "SIGNET_STORAGE_TEST_CHILD"

func TestMain(m *testing.M) {
	dir := os.Getenv("SIGNET_STORAGE_TEST_DIR")
	var err error
	switch os.Getenv(childEnv) {
	case "":
		leaktest.Main(m)
		return
	case "endless":
		err = childEndless(dir)
	case "full":
		err = childFull(dir)
	}
	if err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

func child(t *testing.T, what, dir string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), childEnv+"="+what, "SIGNET_STORAGE_TEST_DIR="+dir)
	return cmd
}

// childEndless writes to a store and a log until it is killed, and says what was
// acknowledged.
func childEndless(dir string) error {
	b, err := storage.OpenBolt(filepath.Join(dir, "state.db"), storage.BoltOptions{})
	if err != nil {
		return err
	}
	l, err := storage.OpenLog(filepath.Join(dir, "log"), storage.LogOptions{Instance: 1, SegmentSize: 16 << 10})
	if err != nil {
		return err
	}
	ctx := context.Background()
	for i := 0; ; i++ {
		seq, err := l.Append(ctx, [][]byte{bytes.Repeat([]byte("r"), 1+i%700)})
		if err != nil {
			return err
		}
		fmt.Println("sequence", seq)
		if i%8 == 0 {
			rev, err := b.Commit(ctx, nil, put(fmt.Sprintf("key/%d", i%40), strings.Repeat("v", i%3000)))
			if err != nil {
				return err
			}
			fmt.Println("revision", rev)
		}
	}
}

func TestAKilledProcessLosesNothingThatItAcknowledged(t *testing.T) {
	t.Parallel()
	dir := privateDir(t)
	rounds := 6
	if testing.Short() {
		rounds = 2
	}
	for range rounds {
		cmd := child(t, "endless", dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		acked := map[string]uint64{}
		lines := bufio.NewScanner(out)
		for n := 40 + rand.IntN(200); lines.Scan(); n-- {
			what, number, _ := strings.Cut(lines.Text(), " ")
			if acked[what], err = strconv.ParseUint(number, 10, 64); err != nil {
				t.Fatalf("child: %s", lines.Text())
			}
			if n == 0 {
				if err := cmd.Process.Kill(); err != nil { // then read on to the end
					t.Fatal(err)
				}
			}
		}
		cmd.Wait() // an error, since it was killed

		path := filepath.Join(dir, "state.db")
		checkBolt(t, path)
		b := openBolt(t, path, storage.BoltOptions{MustExist: true})
		if _, rev, err := b.List(t.Context(), ""); err != nil || rev < acked["revision"] {
			t.Errorf("store is at revision %d, %v; %d was acknowledged", rev, err, acked["revision"])
		}
		closeBolt(t, b)
		l, err := storage.OpenLog(filepath.Join(dir, "log"), storage.LogOptions{Instance: 1, MustExist: true, SegmentSize: 16 << 10})
		if err != nil {
			t.Fatal(err)
		}
		if n := storagetest.CheckLog(t, l, nil); uint64(n) < acked["sequence"] {
			t.Errorf("log has %d records, %d were acknowledged", n, acked["sequence"])
		}
		closeLog(t, l)
	}
}

// childFull lets writes fail as on a full disk: it lowers the limit on the size of
// files step by step, so that they fail at every place of a commit.
func childFull(dir string) error {
	signal.Ignore(unix.SIGXFSZ) // the write returns EFBIG then
	path := filepath.Join(dir, "state.db")
	b, err := storage.OpenBolt(path, storage.BoltOptions{})
	if err != nil {
		return err
	}
	ctx := context.Background()
	if _, err := b.Commit(ctx, nil, put("a", "before")); err != nil {
		return err
	}
	l, err := storage.OpenLog(filepath.Join(dir, "log"), storage.LogOptions{Instance: 1})
	if err != nil {
		return err
	}
	failures := 0
	large := strings.Repeat("v", 200_000)
	for size := uint64(0); size < 1_200_000; size += 30_000 {
		if err := limit(size); err != nil {
			return err
		}
		_, commitErr := b.Commit(ctx, nil, put("a", large))
		_, _, listErr := b.List(ctx, "")
		e, getErr := b.Get(ctx, "a")
		if err := limit(unix.RLIM_INFINITY); err != nil {
			return err
		}
		want := large
		if commitErr != nil {
			failures++
			want = "before"
			if !errors.Is(commitErr, unix.EFBIG) && !strings.Contains(commitErr.Error(), "file too large") {
				return fmt.Errorf("limit %d: the cause is missing: %w", size, commitErr)
			}
			if errors.Is(commitErr, storage.ErrNotDurable) {
				return fmt.Errorf("limit %d: %w", size, commitErr)
			}
		}
		if listErr != nil || getErr != nil || string(e.Value) != want {
			return fmt.Errorf("limit %d, commit %w: List %w, Get %w, %d bytes", size, commitErr, listErr, getErr, len(e.Value))
		}
		// Once there is room again it goes on.
		if _, err := b.Commit(ctx, nil, put("a", "before")); err != nil {
			return fmt.Errorf("limit %d: afterwards: %w", size, err)
		}
		if err := b.Check(ctx); err != nil {
			return fmt.Errorf("limit %d: %w", size, err)
		}
	}
	if failures < 5 {
		return fmt.Errorf("only %d commits failed", failures)
	}
	if err := b.Close(); err != nil {
		return err
	}

	// The log says no from the first failure on.
	if _, err := l.Append(ctx, [][]byte{[]byte("before")}); err != nil {
		return err
	}
	if err := limit(5000); err != nil {
		return err
	}
	_, err = l.Append(ctx, [][]byte{make([]byte, 10_000)})
	if !errors.Is(err, storage.ErrNotDurable) || !errors.Is(err, unix.EFBIG) {
		return fmt.Errorf("log on a full disk: %w", err)
	}
	if err := limit(unix.RLIM_INFINITY); err != nil {
		return err
	}
	if _, err := l.Append(ctx, [][]byte{[]byte("after")}); !errors.Is(err, storage.ErrNotDurable) {
		return fmt.Errorf("log after a full disk: %w", err)
	}
	return nil
}

// limit sets the largest size of a file that this process may write.
func limit(size uint64) error {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &r); err != nil {
		return err
	}
	r.Cur = min(size, r.Max)
	return unix.Setrlimit(unix.RLIMIT_FSIZE, &r)
}

func TestAFullDiskChangesNothing(t *testing.T) {
	t.Parallel()
	dir := privateDir(t)
	if out, err := child(t, "full", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	checkBolt(t, filepath.Join(dir, "state.db"))
	l, err := storage.OpenLog(filepath.Join(dir, "log"), storage.LogOptions{Instance: 1, MustExist: true})
	if err != nil {
		t.Fatal(err)
	}
	if n := storagetest.CheckLog(t, l, map[uint64]string{1: "before"}); n != 1 {
		t.Errorf("%d records, want 1", n)
	}
	if _, err := l.Append(t.Context(), [][]byte{[]byte("after")}); err != nil {
		t.Error(err)
	}
	closeLog(t, l)
}
