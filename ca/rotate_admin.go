package ca

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/signet-mesh/signet/ca/capb"
	"github.com/signet-mesh/signet/ca/journal"
	"github.com/signet-mesh/signet/ca/rotation"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// errForeignRoot is why nothing can be rotated where the root is somebody else's.
var errForeignRoot = errors.New("the root is not this authority's own: whoever has it replaces it")

// rotationGrace is how long a step goes on when whoever asked for it is gone. It signs a few
// certificates and makes a few changes of the state, unless it waits for another replica.
const rotationGrace = 10 * time.Second

// answerWait is how long an operator's step waits for the replica with the root.
const answerWait = 30 * time.Second

var errAnswerWait = fmt.Errorf("it was waited for %v", answerWait)

// Authorities implements signet.ca.v1.Admin.
func (s admin) Authorities(context.Context, *capb.AuthoritiesRequest) (*capb.AuthoritiesResponse, error) {
	resp, err := s.a.authoritiesStatus()
	if err != nil {
		s.a.cfg.Log.Error("listing authorities failed", "err", err)
		return nil, status.Error(codes.Internal, err.Error()) // an operator may know
	}
	return resp, nil
}

func (a *Authority) authoritiesStatus() (*capb.AuthoritiesResponse, error) {
	now, err := a.clock.now()
	if err != nil {
		return nil, err
	}
	j := a.current()
	s, err := j.Rotation()
	if err != nil {
		return nil, err
	}
	resp := &capb.AuthoritiesResponse{TrustSequence: j.Sequence, Foreign: a.cfg.source() != sourceOwn, TaintSpread: durationpb.New(a.cfg.TaintSpread)}
	for _, e := range j.Authorities {
		c, err := e.Cert()
		if err != nil {
			return nil, err
		}
		if c == nil {
			continue
		}
		p := &capb.AuthorityStatus{Kind: e.Kind, State: e.State, SubjectKeyId: c.SubjectKeyId, Id: journal.ID(c), Sequence: e.Sequence,
			NotBefore: timestamppb.New(c.NotBefore), NotAfter: timestamppb.New(c.NotAfter), Since: stamp(e.Since), Tainted: stamp(e.Tainted), Leaves: stamp(e.Leaves), Condemned: stamp(e.Condemned)}
		for _, r := range j.Authorities {
			if root, err := r.Cert(); e.Kind == journal.KindIntermediate && r.Kind == journal.KindRoot && err == nil && bytes.Equal(root.SubjectKeyId, c.AuthorityKeyId) {
				p.Root = journal.ID(root)
			}
		}
		resp.Authorities = append(resp.Authorities, p)
	}
	if resp.Foreign {
		return resp, nil
	}
	v := a.rotationView(now)
	active, _ := s.Active()
	if next, ok := s.Next(); ok {
		resp.Deadline = timestamppb.New(active.End.Add(-v.Rules.Deadline))
		if w := s.Waiting(v); w != nil {
			resp.Activation = waitToProto(next.ID, w)
		}
	}
	resp.Lacking = s.Lacking(active.ID, v)
	for _, r := range s.Roots {
		if w := s.Unreplaced(r.ID, v); w != nil {
			resp.Revocations = append(resp.Revocations, waitToProto(r.ID, w))
		}
	}
	return resp, nil
}

func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func waitToProto(id string, w *rotation.WaitingError) *capb.RotationWait {
	p := &capb.RotationWait{Id: id, Nodes: w.Nodes, Until: stamp(w.Until)}
	for _, r := range w.Replicas {
		p.Replicas = append(p.Replicas, uint32(r))
	}
	return p
}

// Rotate implements signet.ca.v1.Admin.
func (s admin) Rotate(ctx context.Context, q *capb.RotateRequest) (*capb.RotateResponse, error) {
	// What was begun is not given up halfway because an operator's connection ended.
	step, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(rotationGrace, cancel) })()
	id, err := s.a.rotateBy(step, q, operator(ctx))
	var waits *rotation.WaitingError
	switch {
	case errors.As(err, &waits):
		return &capb.RotateResponse{Waits: waitToProto(id, waits), Id: id}, nil
	case errors.Is(err, rotation.ErrUnknown):
		return nil, status.Error(codes.NotFound, err.Error())
	case errors.Is(err, rotation.ErrStage), errors.Is(err, errForeignRoot), errors.Is(err, errElsewhere), errors.Is(err, errFixedKey):
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	case err != nil:
		s.a.cfg.Log.Error("a step of a rotation failed", "step", q.GetStep().String(), "err", err)
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	s.a.cfg.Log.Warn("an operator rotates authorities", "step", q.GetStep().String(), "id", id, "force", q.GetForce(), "by", operator(ctx))
	return &capb.RotateResponse{Id: id}, nil
}

// rotateBy does one step for an operator. It returns the authority that it is about.
func (a *Authority) rotateBy(ctx context.Context, q *capb.RotateRequest, by string) (id string, err error) {
	if a.cfg.source() != sourceOwn {
		return "", errForeignRoot
	}
	a.rotationMu.Lock()
	defer a.rotationMu.Unlock()
	if err := a.adopt(ctx); err != nil {
		return "", err
	}
	if q.GetStep() == capb.RotateRequest_STEP_RENEW {
		return a.renewNow(ctx)
	}
	if step, own := q.GetStep(), a.ownIntermediate(q.GetId()); step == capb.RotateRequest_STEP_TAINT && own {
		now, err := a.clock.now()
		if err != nil {
			return "", err
		}
		return q.GetId(), a.taint(ctx, q.GetId(), now)
	}
	always := func() (bool, error) { return true, nil }
	err = a.alone(ctx, leaseWait, always, func() (err error) { id, err = a.rotateRoot(ctx, q, by); return err })
	if errors.Is(err, errElsewhere) {
		err = fmt.Errorf("%w: ask replica %d", err, a.cfg.RootReplica)
	}
	return id, err
}

// ownIntermediate reports whether an authority is an intermediate of this replica.
func (a *Authority) ownIntermediate(id string) bool {
	return slices.ContainsFunc(a.current().Authorities, func(e journal.Entry) bool {
		c, err := e.Cert()
		return err == nil && c != nil && e.Kind == journal.KindIntermediate && journal.ID(c) == id
	})
}

// renewNow takes another intermediate. rotationMu is held, and let go of while another
// replica is waited for: what is due is done meanwhile, so the caller looks again.
func (a *Authority) renewNow(ctx context.Context) (id string, err error) {
	before := a.intermediate.Load()
	a.badAnswers.until = time.Time{} // whoever asks may have mended it
	err = a.renewIntermediate(ctx)
	waits := func() bool { return !a.holdsRoot() && a.intermediate.Load() == before && a.staged.Load() == nil }
	// Another replica signs it where that has the root's key.
	for end := time.Now().Add(answerWait); err == nil && waits(); {
		if err = a.letOthers(ctx, askEvery); err != nil || time.Now().After(end) {
			return "", fmt.Errorf("replica %d, which has the root's key (authority.rootReplica), has not signed the next intermediate: see that it runs and reaches the state, then do this step again; the request stays, and the intermediate is used when it is signed: %w",
				a.cfg.RootReplica, cmp.Or(err, errAnswerWait))
		}
		if err = a.adopt(ctx); err == nil && waits() {
			err = a.renewIntermediate(ctx)
		}
	}
	return journal.ID(a.intermediate.Load().cert), err
}

// letOthers lets go of rotationMu, which is held, for a while.
func (a *Authority) letOthers(ctx context.Context, d time.Duration) error {
	a.rotationMu.Unlock()
	defer a.rotationMu.Lock()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// rotateRoot does a step that is about roots. rotationMu is held.
func (a *Authority) rotateRoot(ctx context.Context, q *capb.RotateRequest, by string) (id string, err error) {
	now, err := a.clock.now()
	if err != nil {
		return "", err
	}
	o := rotation.Override("")
	if q.GetForce() {
		o = rotation.Force
	}
	switch q.GetStep() {
	case capb.RotateRequest_STEP_PREPARE:
		return a.nextRoot(ctx, now)
	case capb.RotateRequest_STEP_REPLACE:
		return a.replaceRoot(ctx, q.GetId(), now)
	case capb.RotateRequest_STEP_ACTIVATE:
		r, err := a.rootOnTheWay()
		if err == nil {
			err = a.activateRoot(ctx, o, by)
		}
		if err == nil {
			// Run would do it in its next round.
			err = a.renewIntermediate(ctx)
		}
		if err == nil {
			err = a.renewServing(ctx)
		}
		return r.ID, err
	case capb.RotateRequest_STEP_TAINT:
		return q.GetId(), a.taint(ctx, q.GetId(), now)
	case capb.RotateRequest_STEP_REVOKE:
		return q.GetId(), a.revokeRoot(ctx, q.GetId(), o, by)
	case capb.RotateRequest_STEP_DISCARD:
		return q.GetId(), a.discardRoot(ctx, q.GetId())
	}
	return "", fmt.Errorf("%w: a step that this authority does not know", rotation.ErrStage)
}

// rootOnTheWay is the root that is prepared or published, if there is one.
func (a *Authority) rootOnTheWay() (rotation.Root, error) {
	s, err := a.rotationState()
	r, _ := s.Next()
	return r, err
}

// nextRoot makes a root and publishes it. It returns its ID. rotationMu is held.
func (a *Authority) nextRoot(ctx context.Context, now time.Time) (string, error) {
	r, err := a.rootOnTheWay()
	if err == nil && r.Stage != rotation.Prepared { // a crash came between
		err = a.prepareRoot(ctx)
	}
	if err == nil {
		err = a.publishRoot(ctx, now)
	}
	if err == nil {
		r, err = a.rootOnTheWay()
	}
	return r.ID, err
}

// replaceRoot begins to replace a root in an emergency. That it is to go is on record
// before anything is done, so that whoever goes on, also after the next root has become
// active by itself, knows which of the two is which. It returns the ID of the root that
// comes, or of the one that goes if another one signs already. rotationMu is held.
func (a *Authority) replaceRoot(ctx context.Context, id string, now time.Time) (string, error) {
	s, err := a.rotationState()
	if err != nil {
		return id, err
	}
	if r, ok := s.Root(id); !ok || r.Condemned.IsZero() {
		if err := a.rotate(ctx, func(s rotation.State) (rotation.State, error) { return s.Condemn(id, now) }); err != nil {
			return id, err
		}
		a.cfg.Log.Warn("a root is being replaced in an emergency", "root", id)
	}
	if active, _ := s.Active(); active.ID != id {
		return id, nil
	}
	if r, ok := s.Next(); ok && r.Stage == rotation.Published {
		return r.ID, nil
	}
	return a.nextRoot(ctx, now)
}

// taint has agents replace what is below an authority. An intermediate that signs is
// replaced itself first, so that it signs nothing after that. rotationMu is held.
func (a *Authority) taint(ctx context.Context, id string, now time.Time) error {
	s, err := a.rotationState()
	if err != nil {
		return err
	}
	if _, err := s.Taint(id, now); err != nil {
		return err
	}
	if err := a.current().Elsewhere(id); err != nil {
		return fmt.Errorf("tainting %s: %w", id, err)
	}
	if err := a.leave(ctx, func(iss *issuer, root string) bool { return journal.ID(iss.cert) == id || root == id }); err != nil {
		return fmt.Errorf("tainting %s: %w", id, err)
	}
	// The mark is of a key: one that still signs would taint what takes its place.
	signs := a.intermediate.Load().cert
	for _, e := range a.current().Authorities {
		c, err := e.Cert()
		if err != nil {
			return err
		}
		if c != nil && journal.ID(c) == id && bytes.Equal(c.SubjectKeyId, signs.SubjectKeyId) {
			return fmt.Errorf("tainting %s: %w: its key is the one that signs: authority.keys.intermediate names one key; name another", id, rotation.ErrStage)
		}
	}
	return a.rotate(ctx, func(s rotation.State) (rotation.State, error) { return s.Taint(id, now) })
}

// revokeRoot takes a tainted root out of the bundle. rotationMu is held.
func (a *Authority) revokeRoot(ctx context.Context, id string, o rotation.Override, by string) error {
	now, err := a.clock.now()
	if err != nil {
		return err
	}
	v := a.rotationView(now)
	s, err := a.rotationState()
	if err != nil {
		return err
	}
	if _, err := s.Revoke(id, v, rotation.Force); err != nil {
		return err // whoever is waited for
	}
	if err := a.leave(ctx, func(_ *issuer, root string) bool { return root == id }); err != nil {
		return fmt.Errorf("revoking %s: %w", id, err)
	}
	if a.servingDue(now) {
		if err := a.renewServing(ctx); err != nil {
			return fmt.Errorf("revoking %s: %w", id, err)
		}
	}
	if s, err = a.rotationState(); err != nil {
		return err
	}
	if _, err := s.Revoke(id, v, o); err != nil {
		return err
	}
	if err := a.recordOverride(ctx, id, "revoked", o, by, s.Unreplaced(id, v)); err != nil {
		return err
	}
	return a.rotate(ctx, func(s rotation.State) (rotation.State, error) { return s.Revoke(id, v, o) })
}

// leave takes another intermediate below the active root if the present one is what
// must sign no more; its list, if there are any, is not waited for. rotationMu is held.
func (a *Authority) leave(ctx context.Context, must func(iss *issuer, root string) bool) error {
	signs := func() (bool, error) {
		iss := a.intermediate.Load()
		root, err := a.rootOf(iss, a.current())
		if err != nil {
			return false, err
		}
		return must(iss, journal.ID(root)), nil
	}
	still, err := signs()
	if err != nil || !still {
		return err
	}
	root := journal.ID(a.root.Load().cert)
	if s := a.staged.Load(); s != nil && !must(s.issuer, root) {
		if err := a.settled(ctx, s); err != nil {
			return err
		}
	} else if _, err := a.renewNow(ctx); err != nil {
		return err
	}
	root = journal.ID(a.root.Load().cert) // it may be another one after a wait
	if s := a.staged.Load(); s != nil && !must(s.issuer, root) {
		if err := a.settled(ctx, s); err != nil {
			return err
		}
	}
	if still, err = signs(); err == nil && still {
		err = fmt.Errorf("%w: it signs", rotation.ErrStage)
	}
	return err
}
