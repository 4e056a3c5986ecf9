package sds

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// The names that stand for something besides SPIFFE IDs and trust domains.
const (
	NameSVID       = "default" // the SVID with its key, as Istio's agent and SPIRE's name it
	NameBundle     = "ROOTCA"  // the trust bundle of the own trust domain, likewise
	NameAllBundles = "ALL"     // the bundles of all trust domains, for Envoy's SPIFFE validator, as SPIRE's agent names it
)

// resource is what stands for a name at one moment.
type resource struct {
	id     string                           // of its content; "": there is none now, or never
	bundle *Bundle                          // of the own trust domain, with which it makes a client verify; nil: it does not
	number Number                           // of bundle
	svid   *SVID                            // nil: it is none
	render func(delta bool) ([]byte, error) // its part of a response, marshalled
}

// find says what a name stands for now. A name that nobody knows, such as Istio's file-root: and file-cert:, stands for nothing.
func (s *Server) find(name string, m *Materials) resource {
	if asksForSVID(name, m) {
		if m.SVID == nil || name != NameSVID && name != m.SVID.ID.String() {
			return resource{}
		}
		svid := m.SVID
		return resource{id: svidID(svid), svid: svid, render: func(delta bool) ([]byte, error) { return renderSVID(name, svid, delta) }}
	}
	return s.bundlesOf(m).byName[name]
}

// asksForSVID says whether a name stands for the stream's own SVID, or may once there is one.
func asksForSVID(name string, m *Materials) bool {
	if name == NameSVID {
		return true
	}
	if !strings.HasPrefix(name, "spiffe://") {
		return false
	}
	id, err := spiffeid.FromString(name)
	return err == nil && id.Path() != "" && (id == m.ID || m.ID.IsZero())
}

// asksForBundle says whether a name stands for a trust bundle.
func asksForBundle(name string) bool {
	return name == NameBundle || name == NameAllBundles || strings.HasPrefix(name, "spiffe://") && !strings.Contains(name[len("spiffe://"):], "/")
}

// Resources are the kinds of names.
var Resources = []string{NameSVID, NameBundle, NameAllBundles, resourceDomain, resourceID}

const (
	resourceDomain = "trust-domain"
	resourceID     = "spiffe-id"
)

// asksForOwn says whether a name stands for the trust bundle of the own trust domain, or for it among others.
func asksForOwn(name string, own spiffeid.TrustDomain) bool {
	return name == NameBundle || name == NameAllBundles || !own.IsZero() && name == own.IDString()
}

// Resource is a name's kind, of which there are few: what is counted by it.
func Resource(name string) string {
	switch {
	case name == NameSVID, name == NameBundle, name == NameAllBundles:
		return name
	case asksForBundle(name):
		return resourceDomain
	}
	return resourceID
}

// The ids of contents. A client names them when it comes back, so that it is known what it has.

func svidID(svid *SVID) string { return "s-" + serialOf(svid) }

func serialOf(svid *SVID) string {
	if len(svid.Chain) == 0 {
		return ""
	}
	return hex.EncodeToString(svid.Chain[0].SerialNumber.Bytes())
}

// version is what a response of the state-of-the-world protocol makes of a stream: which names were answered, and with what.
type version struct {
	names   string // digest of those that were answered
	own     Number // of the own trust domain's bundle
	bundles string // digest of the numbers of all bundles
	serial  string // of the SVID
}

func (v version) String() string {
	return fmt.Sprintf("%s.%s.%s.%s", v.names, v.own, v.bundles, v.serial)
}

// parseVersion reads what a client names. What is not of this form, or of another server, is no version: then it is not known what the client has.
func parseVersion(text string) (v version, ok bool) {
	parts := strings.Split(text, ".")
	if len(parts) != 4 || len(text) > maxVersion {
		return version{}, false
	}
	return version{names: parts[0], own: parseNumber(parts[1]), bundles: parts[2], serial: parts[3]}, true
}

// digest is short: what it tells apart is a server's own.
func digest(texts ...string) string {
	h := sha256.New()
	for _, text := range texts {
		h.Write([]byte(text))
		h.Write([]byte{0})
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}
