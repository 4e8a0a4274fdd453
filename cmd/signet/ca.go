package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/cmd/internal/issuancelog"
)

// newCACommand is what an operator asks of an authority that runs, over its Unix
// socket.
func newCACommand() *cobra.Command {
	cmd := &cobra.Command{Use: "ca", Short: "Ask a certificate authority that runs, over its Unix socket", Args: cobra.NoArgs}
	var socket string
	cmd.PersistentFlags().StringVar(&socket, "socket", "/var/lib/signet-ca/admin.sock", "adminSocket of the authority, a `PATH`")
	log := &cobra.Command{Use: "log", Short: "Read the issuance log, and decide about it", Args: cobra.NoArgs}
	log.AddCommand(issuancelog.Commands(func(context.Context) (issuancelog.Source, error) { return dialAuthority(socket) })...)
	log.AddCommand(newAcceptLossCommand(&socket))
	cmd.AddCommand(log, newRevokeCommand(&socket), newCRLCommand(&socket), newBanCommand(&socket), newAuthorityCommand(&socket), newAcceptClockCommand(&socket))
	return cmd
}

// authority is a connection to the authority, and its log as a source.
type authority struct {
	socket string
	conn   *grpc.ClientConn
	capb.AdminClient
}

func dialAuthority(socket string) (*authority, error) {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("connecting to the authority: %w", err)
	}
	return &authority{socket, conn, capb.NewAdminClient(conn)}, nil
}

func (a *authority) Close() error { return a.conn.Close() }

// failed says what did not work, and what to do.
func (a *authority) failed(err error) error {
	s := status.Convert(err)
	// An authority that answers says itself what keeps it from doing something.
	if s.Code() == codes.Unavailable && strings.HasPrefix(s.Message(), "connection error") {
		return fmt.Errorf("asking the authority at %s: %s (is it running, and is --socket right? only its owner may ask)", a.socket, s.Message())
	}
	return fmt.Errorf("asking the authority at %s: %s", a.socket, s.Message())
}

func (a *authority) Records(ctx context.Context, q *capb.ListLogRequest) iter.Seq2[*capb.LogEntry, error] {
	return func(yield func(*capb.LogEntry, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		s, err := a.ListLog(ctx, q)
		for err == nil {
			var e *capb.LogEntry
			if e, err = s.Recv(); err == nil && !yield(e, nil) {
				return
			}
		}
		if !errors.Is(err, io.EOF) {
			yield(nil, a.failed(err))
		}
	}
}

func (a *authority) Verify(ctx context.Context, heads []*capb.LogHead, store bool) (*capb.VerifyResponse, error) {
	v, err := a.VerifyLog(ctx, &capb.VerifyLogRequest{Heads: heads, Store: store})
	if err != nil {
		return nil, a.failed(err)
	}
	return v, nil
}

func (a *authority) Head(ctx context.Context) (*capb.LogHead, error) {
	st, err := a.Status(ctx, &capb.StatusRequest{})
	if err != nil {
		return nil, a.failed(err)
	}
	return st.GetLogHead(), nil
}

func newAcceptLossCommand(socket *string) *cobra.Command {
	req := &capb.AcceptLogLossRequest{}
	c := &cobra.Command{Use: "accept-loss --sequence N --reason TEXT", Short: "Let an authority sign again whose issuance log lost records",
		Long: `An authority stops signing when an agent holds a signed head that its issuance log
does not hold: records were lost, or an older copy of the log was put back. Restore
the log if you can. If the records are gone for good, this accepts it; the decision
is recorded, and only the loss that is named is accepted.`,
		Args: cobra.NoArgs,
		RunE: accepting(socket, func(ctx context.Context, a *authority) error {
			_, err := a.AcceptLogLoss(ctx, req)
			return err
		})}
	c.Flags().Uint64Var(&req.Sequence, "sequence", 0, "the record of the head that was lost, as the alarm names it")
	c.Flags().StringVar(&req.Reason, "reason", "", "why, for those who read the log later")
	required(c, "sequence", "reason")
	return c
}

func newAcceptClockCommand(socket *string) *cobra.Command {
	req := &capb.AcceptClockRequest{}
	c := &cobra.Command{Use: "accept-clock --record N --reason TEXT", Short: "Let an authority sign again whose clock is far from what it knew of the time",
		Long: `An authority stops signing while its system clock is more than five minutes before
the newest record of its log, or so far after what it last knew of the time that all
that issues has ended. Set the clock right if it is wrong: signing goes on by itself.
If the clock is right, because the authority was off for long or an earlier time was
wrong, this accepts it; the decision is recorded in the log.`,
		Args: cobra.NoArgs,
		RunE: accepting(socket, func(ctx context.Context, a *authority) error {
			_, err := a.AcceptClock(ctx, req)
			return err
		})}
	c.Flags().Uint64Var(&req.Record, "record", 0, "the newest record, as the alarm names it")
	c.Flags().StringVar(&req.Reason, "reason", "", "why, for those who read the log later")
	required(c, "record", "reason")
	return c
}

// accepting has an authority accept something, after which it signs again.
func accepting(socket *string, accept func(context.Context, *authority) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, _ []string) error {
		return withAuthority(*socket, func(a *authority) error {
			if err := accept(cmd.Context(), a); err != nil {
				return a.failed(err)
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "accepted; the authority signs again\n")
			return err
		})
	}
}
