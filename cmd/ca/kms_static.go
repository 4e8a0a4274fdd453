//go:build !pkcs11

package main

import "github.com/signet-mesh/signet/ca/keys"

// keyManagers open key devices: none, in a static program.
func keyManagers() map[string]keys.Opener { return nil }
