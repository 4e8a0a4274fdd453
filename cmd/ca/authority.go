package main

import (
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/keys"
)

// authorityConfig says where the authority's own certificates and keys come from.
type authorityConfig struct {
	RootTTL         time.Duration `yaml:"rootTTL"`
	IntermediateTTL time.Duration `yaml:"intermediateTTL"`
	// Keys are KMS URIs of where keys are made, and what opens them.
	Keys struct {
		Root         string `yaml:"root"`
		Intermediate string `yaml:"intermediate"`
		// PassphraseFile encrypts keys that are files.
		PassphraseFile string `yaml:"passphraseFile"`
		// SignTimeout is how long a key device may take for a signature.
		SignTimeout time.Duration `yaml:"signTimeout"`
	} `yaml:"keys"`
}

func defaultAuthority() (c authorityConfig) {
	c.RootTTL, c.IntermediateTTL = 365*24*time.Hour, 7*24*time.Hour
	c.Keys.Root, c.Keys.Intermediate = "softkms:", "softkms:"
	c.Keys.SignTimeout = 15 * time.Second
	return c
}

func (c authorityConfig) apply(cfg *ca.Config) {
	cfg.RootTTL, cfg.IntermediateTTL = c.RootTTL, c.IntermediateTTL
	cfg.Keys = keys.Config{
		PassphraseFile: c.Keys.PassphraseFile, SignTimeout: c.Keys.SignTimeout, Managers: keyManagers(),
		Made: map[string]string{keys.Root: c.Keys.Root, keys.Intermediate: c.Keys.Intermediate},
	}
}
