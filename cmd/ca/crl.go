package main

import (
	"encoding/pem"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/cmd/internal/run"
)

// crlRoute serves the authority's CRLs: /crl/ID.crl is one, DER (RFC 2585 section 4.2),
// where ID is its authority's subject key identifier in hexadecimal; /crl/all.pem is all
// of them.
func crlRoute(a *ca.Authority) run.Route {
	return run.Route{Pattern: "GET /crl/{file}", Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		lists := a.CRLs()
		if file := r.PathValue("file"); file != "all.pem" {
			id, _ := strings.CutSuffix(file, ".crl")
			der, ok := lists[id]
			if !ok {
				http.Error(w, "there is no CRL of that authority", http.StatusNotFound)
				return
			}
			w.Header().Set("Content-Type", "application/pkix-crl")
			_, _ = w.Write(der) // the client left
			return
		}
		if len(lists) == 0 {
			http.Error(w, "no CRL is published (authority.crl.enabled)", http.StatusNotFound)
			return
		}
		w.Header().Set("Content-Type", "application/x-pem-file")
		for _, id := range slices.Sorted(maps.Keys(lists)) {
			_ = pem.Encode(w, &pem.Block{Type: "X509 CRL", Bytes: lists[id]}) // the client left
		}
	})}
}
