// Package keys holds an authority's private keys, by KMS URI
// (go.step.sm/crypto/kms): files of its own, or a key device such as a PKCS#11
// token. Which devices there are is decided by whoever opens the ring, so that a
// program links no more than it uses.
//
//	softkms:NAME                    a PKCS#8 PEM file in the ring's folder, 0600,
//	                                written once; encrypted where there is a passphrase
//	pkcs11:token=T;id=HEX;object=L  a key pair in a PKCS#11 token
//	SCHEME:…                        a key that a manager of that scheme knows
//
// # Devices
//
// A device that fails is closed, and opened again at the next use, so a token that
// was taken out and put back needs no restart. Nothing is signed meanwhile, and
// [Ring.Err] says so until a trial signature succeeds again. A signature that takes
// too long fails; the device may finish it, but nobody gets it.
//
// # Trust
//
// Whoever can read the folder and the passphrase has the keys. Whoever has a token
// and its PIN, or may use a key of a cloud's key management, can sign with it as long
// as that lasts, and leaves no record here. A device that answers with another key
// than the one that a certificate carries is refused before it signs.
package keys
