package external_test

import (
	"crypto/x509/pkix"
	"encoding/asn1"
)

var unknownCritical = pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Critical: true, Value: []byte{5, 0}}
