package main

import (
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-mesh/signet/ca/capb"
)

// revocationReasons are the reasons of RFC 5280 section 5.3.1 that an authority takes:
// those that are final.
var revocationReasons = map[string]uint32{
	"unspecified": 0, "keyCompromise": 1, "cACompromise": 2, "affiliationChanged": 3,
	"superseded": 4, "cessationOfOperation": 5, "privilegeWithdrawn": 9, "aACompromise": 10,
}

func reasonName(n uint32) string {
	for name, r := range revocationReasons {
		if r == n {
			return name
		}
	}
	return fmt.Sprintf("reason %d", n)
}

func newRevokeCommand(socket *string) *cobra.Command {
	var reason, comment string
	c := &cobra.Command{Use: "revoke SERIAL", Short: "Take a certificate back before it expires; it is final",
		Long: `Revokes one certificate, by its serial in hexadecimal (signet ca log list). It is
recorded in the issuance log, the authority refuses the certificate from then on, and
the next CRL, which is signed at once, has it.

Who refuses a revoked certificate:
  the authority: an agent's SVID at once, its streams are cut; a renewal with the
    certificate at Istio's door
  proxies whose agent has sds.crl: true, if authority.crl.enabled is set
Who does not:
  proxies that check no CRL, until the certificate expires
  connections that are open already
  a new certificate of the same identity: the pod gets one when it asks again`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			serial, err := hex.DecodeString(strings.ReplaceAll(args[0], ":", ""))
			if err != nil {
				return fmt.Errorf("%q is not a serial in hexadecimal", args[0])
			}
			n, ok := revocationReasons[reason]
			if !ok {
				return fmt.Errorf("--reason %q: one of unspecified, keyCompromise, cACompromise, affiliationChanged, superseded, cessationOfOperation, privilegeWithdrawn, aACompromise", reason)
			}
			return withAuthority(*socket, func(a *authority) error {
				resp, err := a.Revoke(cmd.Context(), &capb.RevokeRequest{Serial: serial, Reason: n, Comment: comment})
				if err != nil {
					return a.failed(err)
				}
				return printRevoked(cmd.OutOrStdout(), resp)
			})
		}}
	c.Flags().StringVar(&reason, "reason", "unspecified", "why, a `REASON` of RFC 5280 section 5.3.1")
	c.Flags().StringVar(&comment, "comment", "", "`TEXT` for those who read the log later")
	return c
}

func printRevoked(w io.Writer, resp *capb.RevokeResponse) error {
	r := resp.GetRevocation()
	what := "revoked"
	if resp.GetAlready() {
		what = "was revoked before, at " + r.GetRevoked().AsTime().Format(time.RFC3339)
	}
	_, err := fmt.Fprintf(w, "%x of %s %s (%s); it expires at %s\n", r.GetSerial(), r.GetSpiffeId(), what, reasonName(r.GetReason()), r.GetUntil().AsTime().Format(time.RFC3339))
	if err != nil {
		return err
	}
	if resp.GetCrlNumber() > 0 {
		_, err = fmt.Fprintf(w, "on CRL number %d\nnot enforced by: proxies whose agent has not sds.crl: true, connections that are open\n", resp.GetCrlNumber())
	} else {
		_, err = fmt.Fprintf(w, "on no CRL: %s\nnot enforced by: any proxy; the authority itself refuses it\n", resp.GetPending())
	}
	return err
}

func newCRLCommand(socket *string) *cobra.Command {
	group := &cobra.Command{Use: "crl", Short: "Look at what was revoked and at the CRLs that say so", Args: cobra.NoArgs}
	var output string
	show := &cobra.Command{Use: "show", Short: "Print what was revoked, and the CRLs", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" && output != "pem" {
				return fmt.Errorf("--output %q: text, json or pem", output)
			}
			return withAuthority(*socket, func(a *authority) error {
				resp, err := a.Revocations(cmd.Context(), &capb.RevocationsRequest{})
				if err != nil {
					return a.failed(err)
				}
				return printRevocations(cmd.OutOrStdout(), resp, output)
			})
		}}
	show.Flags().StringVarP(&output, "output", "o", "text", "text, json, or pem for the CRLs themselves")
	group.AddCommand(show)
	return group
}

// What crl show prints as JSON.
type (
	jsonRevocations struct {
		Published   bool             `json:"published"`
		CRLs        []jsonCRL        `json:"crls"`
		Revocations []jsonRevocation `json:"revocations"`
	}
	jsonCRL struct {
		Authority  string    `json:"authority"`
		Issuer     string    `json:"issuer"`
		Number     string    `json:"number"`
		ThisUpdate time.Time `json:"thisUpdate"`
		NextUpdate time.Time `json:"nextUpdate"`
		Entries    int       `json:"entries"`
	}
	jsonRevocation struct {
		Serial    string    `json:"serial"`
		SPIFFEID  string    `json:"spiffeID"`
		Authority string    `json:"authority"`
		Reason    string    `json:"reason"`
		Comment   string    `json:"comment,omitempty"`
		By        string    `json:"by"`
		Revoked   time.Time `json:"revoked"`
		Until     time.Time `json:"until"`
	}
)

func printRevocations(w io.Writer, resp *capb.RevocationsResponse, output string) error {
	out := jsonRevocations{Published: resp.GetPublished(), CRLs: []jsonCRL{}, Revocations: []jsonRevocation{}}
	for _, der := range resp.GetCrls() {
		if output == "pem" {
			if err := pem.Encode(w, &pem.Block{Type: "X509 CRL", Bytes: der}); err != nil {
				return err
			}
			continue
		}
		c, err := x509.ParseRevocationList(der)
		if err != nil {
			return fmt.Errorf("the authority sent a CRL that cannot be read: %w", err)
		}
		out.CRLs = append(out.CRLs, jsonCRL{hex.EncodeToString(c.AuthorityKeyId), c.Issuer.String(), c.Number.String(), c.ThisUpdate, c.NextUpdate, len(c.RevokedCertificateEntries)})
	}
	for _, r := range resp.GetRevocations() {
		out.Revocations = append(out.Revocations, jsonRevocation{hex.EncodeToString(r.GetSerial()), r.GetSpiffeId(), hex.EncodeToString(r.GetAuthority()),
			reasonName(r.GetReason()), r.GetComment(), r.GetBy(), r.GetRevoked().AsTime(), r.GetUntil().AsTime()})
	}
	switch output {
	case "pem":
		return nil
	case "json":
		return printJSON(w, out)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	if !out.Published {
		fmt.Fprintln(t, "no CRL is published (authority.crl.enabled)")
	}
	for _, c := range out.CRLs {
		fmt.Fprintf(t, "CRL %s of %s\t%d revoked\tuntil %s\t%s\n", c.Number, c.Authority, c.Entries, c.NextUpdate.Format(time.RFC3339), c.Issuer)
	}
	if len(out.Revocations) > 0 {
		fmt.Fprintln(t, "SERIAL\tSPIFFE ID\tREASON\tREVOKED\tEXPIRES\tBY\tCOMMENT")
	}
	for _, r := range out.Revocations {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.Serial, r.SPIFFEID, r.Reason, r.Revoked.Format(time.RFC3339), r.Until.Format(time.RFC3339), r.By, r.Comment)
	}
	return t.Flush()
}
