package ca

import (
	"crypto/x509"
	"slices"
	"time"

	"kedge/ca/ledger"
)

// AuthorityStatus is an authority as people see it.
type AuthorityStatus struct {
	ID          ledger.Hash     `json:"id"`
	Role        ledger.Role     `json:"role"`
	State       ledger.State    `json:"state"`
	Tainted     bool            `json:"tainted"`
	TrustDomain string          `json:"trust_domain"`
	Subject     string          `json:"subject"`
	NotBefore   time.Time       `json:"not_before"`
	NotAfter    time.Time       `json:"not_after"`
	Renews      *time.Time      `json:"renews,omitempty"` // when a successor is due; of the active issuing CA only
	Key         ledger.Hash     `json:"key"`
	KeyType     string          `json:"key_type"`
	Root        *ledger.Hash    `json:"root,omitempty"`
	Coverage    ledger.Coverage `json:"coverage"`
	UnseenUntil *time.Time      `json:"unseen_until,omitempty"` // when the last certificate has ended that the ledger does not know
	LiveSVIDs   uint64          `json:"live_certificates"`      // that chain to it, as the holdings count them
	LastExpiry  *time.Time      `json:"last_expiry,omitempty"`
	Certificate string          `json:"certificate"` // PEM
}

// Authorities lists every authority that the ledger knows, removed ones included, in order of entry.
func (c *CA) Authorities() ([]AuthorityStatus, error) {
	records, err := c.ledger.Authorities()
	if err != nil {
		return nil, err
	}
	holdings, err := c.ledger.Holdings()
	if err != nil {
		return nil, err
	}
	now := c.now()
	live, last := map[ledger.Hash]uint64{}, map[ledger.Hash]time.Time{}
	for _, row := range holdings {
		if end := row.Latest.Time(); end.After(now) {
			live[row.Chain] += row.Count
			if end.After(last[row.Chain]) {
				last[row.Chain] = end
			}
		}
	}
	t, unseen := c.trust.Load(), map[ledger.Hash]time.Time{}
	for _, a := range slices.Concat(t.roots, t.issuing) {
		unseen[a.record.ID] = c.unseen(a)
	}
	all := make([]AuthorityStatus, 0, len(records))
	underRoot, lastUnderRoot := map[ledger.Hash]uint64{}, map[ledger.Hash]time.Time{}
	for _, record := range records {
		cert, err := x509.ParseCertificate(record.Certificate)
		if err != nil {
			return nil, err
		}
		s := AuthorityStatus{
			ID: record.ID, Role: record.Role, State: record.State, Tainted: record.Tainted, TrustDomain: record.TrustDomain,
			Subject: cert.Subject.String(), NotBefore: cert.NotBefore, NotAfter: cert.NotAfter, Key: record.Key, KeyType: KeyType(cert.PublicKey),
			Coverage: record.Coverage, Certificate: encodePEM(record.Certificate),
		}
		if end := unseen[record.ID]; !end.IsZero() {
			s.UnseenUntil = &end
		}
		if record.Role == ledger.RoleIssuing {
			chain := ledger.ChainHash(record.Chain)
			s.Root, s.LiveSVIDs = &record.Root, live[chain]
			if end, ok := last[chain]; ok {
				s.LastExpiry = &end
			}
			underRoot[record.Root] += live[chain]
			if last[chain].After(lastUnderRoot[record.Root]) {
				lastUnderRoot[record.Root] = last[chain]
			}
			if active := t.active; active != nil && active.record.ID == record.ID && record.KeyRef != "" {
				due := active.halfLife()
				s.Renews = &due
			}
		}
		all = append(all, s)
	}
	for i := range all {
		if all[i].Role == ledger.RoleRoot {
			all[i].LiveSVIDs = underRoot[all[i].ID]
			if end := lastUnderRoot[all[i].ID]; !end.IsZero() {
				all[i].LastExpiry = &end
			}
		}
	}
	return all, nil
}

// Active is the id of the issuing CA that signs now, if there is one.
func (c *CA) Active() (ledger.Hash, bool) {
	active := c.trust.Load().active
	if active == nil || active.key == nil {
		return ledger.Hash{}, false
	}
	return active.record.ID, true
}
