package main

import (
	"fmt"
	"io"
	"log/slog"

	"github.com/signet-mesh/signet/authz/provider"
	"github.com/signet-mesh/signet/authz/record"
	"github.com/signet-mesh/signet/cmd/internal/version"

	"github.com/prometheus/client_golang/prometheus"
)

// toStdout is the value of records.file for standard output.
const toStdout = "stdout"

// providers asks the extension providers of CUSTOM policies.
func (c config) providers(reg prometheus.Registerer) (*provider.Providers, error) {
	p, err := provider.New(provider.Config{Providers: c.ExtensionProviders, Metrics: reg})
	if err != nil {
		return nil, fmt.Errorf("extensionProviders: %w", err)
	}
	return p, nil
}

// recorder counts and records decisions.
func (c config) recorder(stdout io.Writer, log *slog.Logger, reg prometheus.Registerer) (*record.Recorder, error) {
	rc := c.Records
	var outputs []record.Output
	switch rc.File {
	case "":
	case toStdout:
		outputs = append(outputs, record.Stream(toStdout, stdout))
	default:
		f, err := record.OpenFile(rc.File, rc.FileBytes, rc.Files)
		if err != nil {
			return nil, fmt.Errorf("records.file: %w", err)
		}
		outputs = append(outputs, f)
	}
	if rc.OTLP.Endpoint != "" {
		o, err := record.NewOTLP(record.OTLPConfig{Endpoint: rc.OTLP.Endpoint, Headers: rc.OTLP.Headers, Timeout: rc.OTLP.Timeout, Node: c.Node, Version: version.Current().String()})
		if err != nil {
			return nil, fmt.Errorf("records.otlp: %w", err)
		}
		outputs = append(outputs, o)
	}
	r, err := record.New(record.Config{
		Outputs: outputs, Allowed: rc.Allowed, AllowedPerSecond: rc.AllowedPerSecond, Redacted: rc.Redact, Headers: rc.Headers, Claims: rc.Claims,
		Query: rc.Query, QueueBytes: rc.QueueBytes, MaxPolicies: rc.MaxPolicies, Log: log, Metrics: reg,
	})
	if err != nil {
		return nil, fmt.Errorf("records: %w", err)
	}
	return r, nil
}
