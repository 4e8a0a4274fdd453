package run

import (
	"fmt"
	"io"
	"log/slog"
)

// LogConfig says how a daemon logs.
type LogConfig struct {
	// Format is text (logfmt, the default) or json.
	Format string `yaml:"format"`
	// Level is debug, info (the default), warn or error.
	Level string `yaml:"level"`
}

// New makes a logger that writes to w.
func (c LogConfig) New(w io.Writer) (*slog.Logger, error) {
	level := slog.LevelInfo
	if c.Level != "" {
		if err := level.UnmarshalText([]byte(c.Level)); err != nil {
			return nil, fmt.Errorf("log.level %q: must be debug, info, warn or error", c.Level)
		}
	}
	opt := &slog.HandlerOptions{Level: level}
	switch c.Format {
	case "", "text":
		return slog.New(slog.NewTextHandler(w, opt)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opt)), nil
	}
	return nil, fmt.Errorf("log.format %q: must be text or json", c.Format)
}
