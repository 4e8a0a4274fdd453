//go:build pkcs11

package main

import (
	"context"

	"github.com/signet-mesh/signet/ca/keys"

	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/pkcs11"
)

// keyManagers open key devices: PKCS#11 tokens, whose modules are C.
func keyManagers() map[string]keys.Opener {
	return map[string]keys.Opener{
		pkcs11.Scheme: func(ctx context.Context, opts apiv1.Options) (apiv1.KeyManager, error) { return pkcs11.New(ctx, opts) },
	}
}
