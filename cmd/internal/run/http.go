package run

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// HTTPConfig is the address of metrics and health.
type HTTPConfig struct {
	// Listen is HOST:PORT for /metrics, /healthz and /readyz. Empty: not served.
	Listen string `yaml:"listen"`
	// Pprof also serves Go's profiles below /debug/pprof/. Off by default.
	Pprof bool `yaml:"pprof"`
}

// Health collects the reasons why a daemon is not ready. Safe for concurrent
// use; the zero value is ready.
type Health struct {
	mu     sync.Mutex
	checks []check // guarded by mu
	alarms []check // guarded by mu
	ending bool    // guarded by mu
}

type check struct {
	name string
	f    func() error
}

// Add registers a check. f is called at each request for /readyz; it must be
// quick, and an error is the reason why the daemon is not ready.
func (h *Health) Add(name string, f func() error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.checks = append(h.checks, check{name, f})
}

// AddAlarm registers what needs an operator while the daemon still does its work: a
// request for /readyz is told, and gets 200 all the same. Not to be ready would take
// away what still works.
func (h *Health) AddAlarm(name string, f func() error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.alarms = append(h.alarms, check{name, f})
}

// Alarms is nil when there is none, else every alarm, joined.
func (h *Health) Alarms() error {
	h.mu.Lock()
	alarms := h.alarms
	h.mu.Unlock()
	var errs []error
	for _, c := range alarms {
		if err := c.f(); err != nil {
			errs = append(errs, fmt.Errorf("alarm: %s: %w", c.name, err))
		}
	}
	return errors.Join(errs...)
}

// End makes the daemon not ready for good: the first step of an orderly end.
func (h *Health) End() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ending = true
}

// Err is nil when the daemon is ready, else every reason, joined.
func (h *Health) Err() error {
	h.mu.Lock()
	checks, ending := h.checks, h.ending
	h.mu.Unlock()
	var errs []error
	if ending {
		errs = append(errs, errors.New("shutting down"))
	}
	for _, c := range checks {
		if err := c.f(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", c.name, err))
		}
	}
	return errors.Join(errs...)
}

// ServeHTTP serves metrics and health until ctx ends. A nil error means that ctx
// ended, or that c.Listen is empty. What is on routes is public, as metrics are.
func ServeHTTP(ctx context.Context, c HTTPConfig, reg *prometheus.Registry, h *Health, log *slog.Logger, routes ...Route) error {
	if c.Listen == "" {
		return nil
	}
	l, err := net.Listen("tcp", c.Listen)
	if err != nil {
		return fmt.Errorf("serving metrics and health: http.listen: %w", err)
	}
	log.Info("serving metrics and health", "address", l.Addr().String())
	s := &http.Server{Handler: handler(c, reg, h, routes), ReadHeaderTimeout: 5 * time.Second}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	select {
	case err = <-done:
		return fmt.Errorf("serving metrics and health on %s: %w", c.Listen, err)
	case <-ctx.Done():
	}
	// Nothing waits for an answer of this server, so it is not drained.
	_ = s.Close()
	<-done
	return nil
}

// Route is something more that a daemon serves beside metrics and health.
type Route struct {
	// Pattern is that of http.ServeMux.
	Pattern string
	http.Handler
}

func handler(c HTTPConfig, reg *prometheus.Registry, h *Health, routes []Route) http.Handler {
	mux := http.NewServeMux()
	for _, r := range routes {
		mux.Handle(r.Pattern, r)
	}
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{EnableOpenMetrics: true}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		// Alive means that this server answers. What is wrong elsewhere is no
		// reason to be killed: it would drop SVIDs that are still good.
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := h.Err(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
		if err := h.Alarms(); err != nil {
			fmt.Fprintln(w, err)
		}
	})
	if c.Pprof {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	}
	return mux
}
