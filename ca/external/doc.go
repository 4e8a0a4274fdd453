// Package external is about certificates of an authority that somebody else signed:
// an offline root, an upstream authority, or whoever filled a folder with the files
// that Istio calls cacerts. It makes requests and checks what comes back; it signs no
// certificate and keeps nothing.
//
// What comes back is checked before it is used: it certifies the key that was asked
// for, has the profile of a signing certificate (X509-SVID §4), leads in order to a
// root that is expected, and every SVID that will be issued under it would verify.
// The last is tried, not deduced: see [Check].
//
// # Trust
//
// Whoever signs an intermediate for this authority is trusted like it, as is whoever
// can write the folder. A command that is asked for a chain can at most refuse: what
// it prints must certify the authority's own key under a root that the configuration
// names, so it cannot introduce another.
package external
