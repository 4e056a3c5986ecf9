package ca

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"kedge/ca/ledger"
)

// Rehearsal is what a rehearsal found.
type Rehearsal struct {
	Roots   []*x509.Certificate // trust anchors, the root's first
	Chain   []*x509.Certificate // of the issuing CA that would sign, without the root
	Brought bool                // it came with the root
}

// rehearsedLifetime is how long the issuing CA of a rehearsal lives, whose key is deleted at once.
const rehearsedLifetime = 10 * time.Minute

// Rehearse goes through what a first start does with a root and a key store, and leaves nothing that counts: it makes a key, has it certified for ten minutes, lets
// it sign a throwaway leaf, makes the checks on it that a client makes, and deletes the key. An issuing CA that the root brings is proved as it is.
func Rehearse(ctx context.Context, root Root, keys KeyStore, td spiffeid.TrustDomain, spec KeySpec) (found Rehearsal, err error) {
	if found.Roots, err = root.Roots(ctx); err != nil {
		return found, fmt.Errorf("asking the root for its trust anchors: %w", err)
	}
	now := time.Now()
	for _, anchor := range found.Roots {
		if err := checkRoot(anchor, td, now); err != nil {
			return found, fmt.Errorf("the root certificate %q cannot be a trust anchor: %w", anchor.Subject, err)
		}
	}
	if source, ok := root.(IssuingRoot); ok {
		chain, key, err := source.Issuing(ctx)
		if err != nil {
			return found, fmt.Errorf("asking the root for its issuing CA: %w", err)
		}
		if len(chain) > 0 {
			found.Chain, found.Brought = chain, true
			anchor, err := checkBrought(chain, key, found.Roots, now)
			if err != nil {
				return found, err
			}
			a, err := rehearsed(chain, anchor)
			if err == nil {
				err = a.use(key)
			}
			if err == nil {
				err = proveAuthority(a, found.Roots, td, newSerial(ledger.LogID{}))
			}
			return found, err
		}
	}
	ref, key, err := keys.Create(ctx, spec)
	if err != nil {
		return found, fmt.Errorf("making a key: %w", err)
	}
	defer func() {
		if deleteErr := keys.Delete(context.WithoutCancel(ctx), ref); deleteErr != nil {
			err = errors.Join(err, fmt.Errorf("deleting the rehearsal's key %s: %w", ref, deleteErr))
		}
	}()
	opened, err := keys.Open(ctx, ref)
	if err != nil {
		return found, fmt.Errorf("opening the key that was just made: %w", err)
	}
	request := CertifyRequest{PublicKey: key.Public(), TrustDomain: td.Name(), CommonName: "Kedge rehearsal " + now.UTC().Format("2006-01-02 15:04:05"),
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(rehearsedLifetime)}
	request.CSR, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: request.CommonName}}, opened)
	if err != nil {
		return found, fmt.Errorf("signing with the key: %w", err)
	}
	if found.Chain, err = root.Certify(ctx, request); err != nil {
		return found, fmt.Errorf("having it certified by the root: %w", err)
	}
	anchor, err := checkIssuing(found.Chain, found.Roots, request, td)
	if err != nil {
		return found, err
	}
	a, err := rehearsed(found.Chain, anchor)
	if err == nil {
		err = a.use(opened)
	}
	if err == nil {
		err = proveAuthority(a, found.Roots, td, newSerial(ledger.LogID{}))
	}
	return found, err
}

// rehearsed is an authority that no ledger has.
func rehearsed(chain []*x509.Certificate, anchor *x509.Certificate) (*authority, error) {
	record := ledger.AuthorityRecord{ID: AuthorityID(chain[0])}
	record.Founded = ledger.Founded{Role: ledger.RoleIssuing, Certificate: chain[0].Raw, Root: AuthorityID(anchor)}
	for _, link := range chain {
		record.Chain = append(record.Chain, link.Raw)
	}
	return loadAuthority(record, map[ledger.Hash]*x509.Certificate{AuthorityID(anchor): anchor})
}
