package demo

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// logPosition is a moment in a log.
type logPosition struct {
	file   string
	offset int64
}

// endOf is now.
func endOf(file string) (logPosition, error) {
	info, err := os.Stat(file)
	if err != nil {
		return logPosition{}, fmt.Errorf("reading a log: %w", err)
	}
	return logPosition{file, info.Size()}, nil
}

// wait waits for the first line after the position that is the one. A log is
// written a moment after what it tells of.
func (l logPosition) wait(ctx context.Context, is func(line []byte) bool) error {
	err := poll(ctx, 5*time.Second, func() error {
		f, err := os.Open(l.file)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := f.Seek(l.offset, io.SeekStart); err != nil {
			return err
		}
		for lines := bufio.NewScanner(f); lines.Scan(); {
			if is(lines.Bytes()) {
				return nil
			}
		}
		return errors.New("there is no such line")
	})
	if err != nil {
		return fmt.Errorf("reading %s: %w", l.file, err)
	}
	return nil
}

// access is a line of a proxy's access log.
type access struct {
	Path         string `json:"path"`
	Code         int    `json:"code"`
	Peer         string `json:"peer"`
	PeerSerial   string `json:"peer_serial"`
	UpstreamPeer string `json:"upstream_peer"`
	Policy       string `json:"policy"`
	Reason       string `json:"reason"`
}

// accessFrom is the end of a proxy's access log.
func (s *stage) accessFrom(p pod) (logPosition, error) { return endOf(accessLog(s.logs(), p.app)) }

// find waits for the line about a request.
func (l logPosition) find(ctx context.Context, path string, code int) (access, error) {
	var found access
	err := l.wait(ctx, func(line []byte) bool {
		var a access
		// The last line may be half written.
		if json.Unmarshal(line, &a) != nil || a.Path != path || a.Code != code {
			return false
		}
		found = a
		return true
	})
	if err != nil {
		return access{}, fmt.Errorf("looking for GET %s %d in an access log: %w", path, code, err)
	}
	return found, nil
}

// refusal waits for the agent to tell why it refused a caller.
func (l logPosition) refusal(ctx context.Context) (reason string, err error) {
	err = l.wait(ctx, func(line []byte) bool {
		text := string(line)
		_, after, ok := strings.Cut(text, " err=")
		if !ok || !strings.Contains(text, `msg="caller refused"`) {
			return false
		}
		if reason, err = strconv.Unquote(after); err != nil {
			reason = after // a reason of one word
		}
		return true
	})
	if err != nil {
		return "", fmt.Errorf("looking for the reason in the agent's log: %w", err)
	}
	return reason, nil
}

// tail is the last lines of a file.
func tail(path string, lines int) (string, error) {
	const most = 64 << 10
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > most {
		if _, err := f.Seek(-most, io.SeekEnd); err != nil {
			return "", err
		}
	}
	b, err := io.ReadAll(io.LimitReader(f, most))
	if err != nil {
		return "", err
	}
	text := strings.TrimRight(string(b), "\n")
	if text == "" {
		return "", errors.New("it is empty")
	}
	all := strings.Split(text, "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n"), nil
}

// printLogs shows the ends of the children's logs.
func (s *stage) printLogs(w io.Writer) {
	for _, name := range []string{"signet-ca", "signet-agent", serverPod.app, clientPod.app} {
		path := filepath.Join(s.logs(), name+".log")
		text, err := tail(path, 12)
		if err != nil {
			continue // it was not started, or has nothing to say
		}
		fmt.Fprintf(w, "--- the end of %s\n%s\n", path, text)
	}
}
