package main

import (
	"context"

	"github.com/signet-mesh/signet/ca/keys"

	"go.step.sm/crypto/kms/apiv1"
	"go.step.sm/crypto/kms/awskms"
	"go.step.sm/crypto/kms/azurekms"
	"go.step.sm/crypto/kms/cloudkms"
)

// keyManagers open keys of the clouds' key management: AWS (awskms:), Google Cloud
// (cloudkms:) and Azure (azurekms:).
func keyManagers() map[string]keys.Opener {
	return map[string]keys.Opener{
		awskms.Scheme:   func(ctx context.Context, o apiv1.Options) (apiv1.KeyManager, error) { return awskms.New(ctx, o) },
		cloudkms.Scheme: func(ctx context.Context, o apiv1.Options) (apiv1.KeyManager, error) { return cloudkms.New(ctx, o) },
		azurekms.Scheme: func(ctx context.Context, o apiv1.Options) (apiv1.KeyManager, error) { return azurekms.New(ctx, o) },
	}
}
