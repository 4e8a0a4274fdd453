package issuancelog

import (
	"bufio"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"text/tabwriter"
	"time"

	"github.com/signet-mesh/signet/ca/capb"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// Source is where records come from.
type Source interface {
	// Records yields what is asked for, oldest first; an error comes last.
	Records(ctx context.Context, q *capb.ListLogRequest) iter.Seq2[*capb.LogEntry, error]
	// Verify checks the log, and the state with it.
	Verify(ctx context.Context, heads []*capb.LogHead, store bool) (*capb.VerifyResponse, error)
	// Head is the newest signed head; nil if there is none.
	Head(ctx context.Context) (*capb.LogHead, error)
	Close() error
}

// ErrProblems is returned by verification that found something, which is printed.
var ErrProblems = errors.New("verification found problems")

// maxHead bounds the file of a head.
const maxHead = 64 << 10

// Commands are the commands; open is called when one runs.
func Commands(open func(context.Context) (Source, error)) []*cobra.Command {
	with := func(f func(*cobra.Command, Source) error) func(*cobra.Command, []string) error {
		return func(cmd *cobra.Command, _ []string) error {
			s, err := open(cmd.Context())
			if err != nil {
				return err
			}
			return errors.Join(f(cmd, s), s.Close())
		}
	}
	return []*cobra.Command{list(with), export(with), verify(with), head(with)}
}

type runner func(func(*cobra.Command, Source) error) func(*cobra.Command, []string) error

// query is the flags that choose records.
type query struct {
	from, limit               uint64
	since, until              string
	id, node, pod, serial, by string
}

func (q *query) flags(c *cobra.Command) {
	f := c.Flags()
	f.Uint64Var(&q.from, "from", 0, "from this `SEQUENCE` of the present instance on")
	f.StringVar(&q.since, "since", "", "written since `TIME`: RFC 3339, or how long ago, such as 24h")
	f.StringVar(&q.until, "until", "", "written until `TIME`")
	f.StringVar(&q.id, "id", "", "of this SPIFFE `ID`")
	f.StringVar(&q.node, "node", "", "asked for by the agent of this `NODE`")
	f.StringVar(&q.pod, "pod", "", "of the pod with this `UID`")
	f.StringVar(&q.serial, "serial", "", "with this serial, in `HEX`")
	f.StringVar(&q.by, "key-hash", "", "of the key with this SHA-256, in `HEX`")
}

func (q *query) request(now time.Time) (*capb.ListLogRequest, error) {
	r := &capb.ListLogRequest{From: q.from, Limit: q.limit, SpiffeId: q.id, Node: q.node, PodUid: q.pod}
	var errs []error
	moment := func(flag, s string) *timestamppb.Timestamp {
		if s == "" {
			return nil
		}
		if d, err := time.ParseDuration(s); err == nil && d >= 0 {
			return timestamppb.New(now.Add(-d))
		}
		t, err := time.Parse(time.RFC3339, s)
		if err != nil {
			errs = append(errs, fmt.Errorf("--%s: %q is neither a time such as 2026-11-25T12:00:00Z nor a duration such as 24h", flag, s))
			return nil
		}
		return timestamppb.New(t)
	}
	r.Since, r.Until = moment("since", q.since), moment("until", q.until)
	for flag, v := range map[string]struct {
		text string
		to   *[]byte
	}{"serial": {q.serial, &r.Serial}, "key-hash": {q.by, &r.KeyHash}} {
		b, err := hex.DecodeString(v.text)
		if err != nil {
			errs = append(errs, fmt.Errorf("--%s: %q is not hexadecimal", flag, v.text))
		}
		*v.to = b
	}
	return r, errors.Join(errs...)
}

func list(with runner) *cobra.Command {
	var q query
	var output string
	c := &cobra.Command{Use: "list", Short: "List records of the issuance log, oldest first", Args: cobra.NoArgs,
		RunE: with(func(cmd *cobra.Command, s Source) error {
			r, err := q.request(time.Now())
			if err != nil {
				return err
			}
			switch output {
			case "json":
				return writeJSON(cmd.Context(), cmd.OutOrStdout(), s, r)
			case "text":
				return writeText(cmd.Context(), cmd.OutOrStdout(), s, r)
			}
			return fmt.Errorf("--output: %q is not text or json", output)
		})}
	q.flags(c)
	c.Flags().Uint64Var(&q.limit, "limit", 0, "at most this many; 0 lists all")
	c.Flags().StringVarP(&output, "output", "o", "text", "text, or json: one object a line")
	return c
}

func export(with runner) *cobra.Command {
	var q query
	c := &cobra.Command{Use: "export", Short: "Write records of the issuance log as JSON, one object a line", Args: cobra.NoArgs,
		RunE: with(func(cmd *cobra.Command, s Source) error {
			r, err := q.request(time.Now())
			if err != nil {
				return err
			}
			return writeJSON(cmd.Context(), cmd.OutOrStdout(), s, r)
		})}
	q.flags(c)
	return c
}

func writeJSON(ctx context.Context, w io.Writer, s Source, q *capb.ListLogRequest) error {
	b := bufio.NewWriter(w)
	e := json.NewEncoder(b)
	for r, err := range s.Records(ctx, q) {
		if err == nil {
			err = e.Encode(entryOf(r))
		}
		if err != nil {
			return errors.Join(err, b.Flush())
		}
	}
	return b.Flush()
}

func writeText(ctx context.Context, out io.Writer, s Source, q *capb.ListLogRequest) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "RECORD\tTIME\tKIND\tIDENTITY\tNODE\tEVIDENCE\tPOD UID\tSERIAL\tNOT AFTER")
	n := 0
	for r, err := range s.Records(ctx, q) {
		if err != nil {
			return errors.Join(err, w.Flush())
		}
		e := entryOf(r)
		what, end := e.SPIFFEID, ""
		if e.NotAfter != nil {
			end = e.NotAfter.Format(time.RFC3339)
		}
		if e.ForInstance != 0 {
			what = fmt.Sprintf("for instance %d", e.ForInstance)
		}
		if e.Decision != nil {
			what = e.Decision.What + ": " + e.Decision.Reason
		}
		fmt.Fprintf(w, "%d/%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", e.Instance, e.Sequence, e.Time.Format(time.RFC3339), e.Kind,
			printable(what), printable(e.Node), e.Evidence, printable(e.PodUID), e.Serial, end)
		if n++; n%200 == 0 {
			if err := w.Flush(); err != nil {
				return err
			}
		}
	}
	return w.Flush()
}

func verify(with runner) *cobra.Command {
	var heads []string
	var store bool
	var output string
	c := &cobra.Command{Use: "verify", Short: "Check the whole issuance log",
		Long: `Checks that the log is what was written: every checksum and hash, that no record
is missing, every signature, and what the records say. With --head also that the
log still holds what a signed head says that somebody kept: only that tells that
the end of a log was cut, or that an older copy was put in its place.`,
		Args: cobra.NoArgs,
		RunE: with(func(cmd *cobra.Command, s Source) error {
			var given []*capb.LogHead
			for _, path := range heads {
				h, err := readHead(path)
				if err != nil {
					return err
				}
				given = append(given, h)
			}
			v, err := s.Verify(cmd.Context(), given, store)
			if err != nil {
				return err
			}
			return Report(cmd.OutOrStdout(), v, output)
		})}
	c.Flags().StringArrayVar(&heads, "head", nil, "`FILE` with a signed head, as the command head printed it; may be repeated")
	c.Flags().BoolVar(&store, "store", false, "check the state too, and that what it relies on was recorded")
	c.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return c
}

func head(with runner) *cobra.Command {
	return &cobra.Command{Use: "head", Short: "Print the newest signed head, to be kept elsewhere", Args: cobra.NoArgs,
		RunE: with(func(cmd *cobra.Command, s Source) error {
			h, err := s.Head(cmd.Context())
			if err != nil {
				return err
			}
			if h.GetSequence() == 0 {
				return errors.New("no head was signed yet")
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(headOf(h))
		})}
}

func readHead(path string) (*capb.LogHead, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading a head: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxHead))
	if err != nil {
		return nil, fmt.Errorf("reading a head: %w", err)
	}
	h, err := parseHead(b)
	if err != nil {
		return nil, fmt.Errorf("reading a head from %s: %w", path, err)
	}
	return h, nil
}
