package record

import (
	"context"
	"net/http"
	"os"
	"time"
)

// Faulty makes a file fail: each write is cut to what left says, and fails where that
// is less than all; truncating fails if truncate says so.
func (f *File) Faulty(left func(n int) int, truncate func() error) {
	f.close()
	f.open = func(path string) (file, error) {
		h, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
		return faulty{h, left, truncate}, err
	}
}

type faulty struct {
	*os.File
	left     func(n int) int
	truncate func() error
}

func (f faulty) Write(b []byte) (int, error) {
	if n := f.left(len(b)); n < len(b) {
		n, _ = f.File.Write(b[:n])
		return n, os.ErrDeadlineExceeded
	}
	return f.File.Write(b)
}

func (f faulty) Truncate(size int64) error {
	if err := f.truncate(); err != nil {
		return err
	}
	return f.File.Truncate(size)
}

// Put writes lines at once.
func (f *File) Put(lines ...string) (lost int, err error) {
	var ls []line
	for _, l := range lines {
		ls = append(ls, line{text: []byte(l)})
	}
	return f.write(context.Background(), ls)
}

// Shrink bounds a file below what is allowed.
func (f *File) Shrink(most int64) { f.most = most }

// Hasten shortens the pauses before what is sent again.
func (o *OTLP) Hasten(c *http.Client) { o.first, o.client = time.Millisecond, c }

// Waiting takes what waits at the first output, where nothing runs.
func (r *Recorder) Waiting() (heads []Record) {
	r.drain()
	for o := r.outputs[0]; ; {
		select {
		case l := <-o.queue:
			o.bytes.Add(-int64(len(l.text)))
			heads = append(heads, *l.record)
			continue
		default:
		}
		return heads
	}
}

// Bytes are those that are counted of what waits.
func (r *Recorder) Bytes() int64 { return r.bytes.Load() }
