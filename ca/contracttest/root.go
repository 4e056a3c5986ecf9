package contracttest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"kedge/ca"
)

// TrustDomain is the one that the Root under test must be for.
const TrustDomain = "contract.example"

// lifetime is what the suite asks for an issuing CA. The Root under test must live longer.
const lifetime = 7 * 24 * time.Hour

// Root tests that what make returns keeps the promises of ca.Root, and those that ca checks of every chain before it uses it.
// make gives a working root for TrustDomain that lives longer than a week; faults are what can happen to what it depends on, by name. nil: that is nothing outside of the process.
func Root(t *testing.T, make func(t *testing.T) ca.Root, faults map[string]func(root ca.Root) Fault) {
	t.Run("the chain leads to one of its roots and is a CA for leaves only", func(t *testing.T) {
		root := make(t)
		for name, key := range issuingKeys(t) {
			t.Run(name, func(t *testing.T) { checkChain(t, root, certify(t, root, request(t, key)), key.Public()) })
		}
	})
	t.Run("validity never outlives the request", func(t *testing.T) {
		root := make(t)
		for _, life := range []time.Duration{time.Minute, time.Hour, lifetime} {
			request := request(t, newKey(t))
			request.NotAfter = request.NotBefore.Add(life)
			cert := certify(t, root, request)[0]
			if cert.NotAfter.After(request.NotAfter) || cert.NotBefore.Before(request.NotBefore.Truncate(time.Second)) {
				t.Errorf("asked for %s to %s, got %s to %s", request.NotBefore, request.NotAfter, cert.NotBefore, cert.NotAfter)
			}
			if !cert.NotBefore.Before(cert.NotAfter) {
				t.Errorf("asked for %s, got a certificate that is never valid", life)
			}
		}
	})
	t.Run("validity never outlives the root", func(t *testing.T) {
		root := make(t)
		request := request(t, newKey(t))
		request.NotBefore, request.NotAfter = time.Now().AddDate(-30, 0, 0), time.Now().AddDate(200, 0, 0)
		checkChain(t, root, certify(t, root, request), request.PublicKey)
	})
	t.Run("its roots keep their order", func(t *testing.T) {
		root := make(t)
		first := roots(t, root)
		certify(t, root, request(t, newKey(t)))
		if again := roots(t, root); !sameCertificates(first, again) {
			t.Errorf("Roots gave %d certificates, then %d, or others, or in another order", len(first), len(again))
		}
	})
	t.Run("what a caller does to the roots it got changes nothing", func(t *testing.T) {
		root := make(t)
		first := roots(t, root)
		kept := append([]*x509.Certificate(nil), first...)
		first[0] = &x509.Certificate{}
		if !sameCertificates(kept, roots(t, root)) {
			t.Error("overwriting an element of what Roots returned changed what it returns")
		}
	})
	t.Run("serial numbers are positive, long and never the same", func(t *testing.T) {
		root, key, seen := make(t), newKey(t), map[string]bool{}
		for range 8 {
			serial := certify(t, root, request(t, key))[0].SerialNumber
			if serial.Sign() <= 0 || serial.BitLen() < 64 || serial.BitLen() > 159 { // RFC 5280 4.1.2.2, and CA/Browser Forum 7.1 for the entropy
				t.Errorf("the serial number %x has %d bits", serial, serial.BitLen())
			}
			if seen[serial.String()] {
				t.Errorf("the serial number %x came twice", serial)
			}
			seen[serial.String()] = true
		}
	})
	t.Run("it serves several callers at once", func(t *testing.T) {
		root := make(t)
		want := roots(t, root)
		var all sync.WaitGroup
		for i := range 4 {
			key := newKey(t)
			request := request(t, key)
			all.Go(func() {
				request.CommonName = fmt.Sprintf("issuing CA %d", i)
				chain, err := root.Certify(t.Context(), request)
				if err != nil {
					t.Errorf("Certify: %v", err)
					return
				}
				if !ca.SameKey(chain[0].PublicKey, key.Public()) {
					t.Error("a caller got the certificate of another's key")
				}
				if got, err := root.Roots(t.Context()); err != nil || !sameCertificates(got, want) {
					t.Errorf("Roots: %d certificates, %v", len(got), err)
				}
			})
		}
		all.Wait()
	})
	t.Run("a cancelled context ends it with that error", func(t *testing.T) {
		root, key := make(t), newKey(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := root.Certify(ctx, request(t, key)); !errors.Is(err, context.Canceled) {
			t.Errorf("Certify with a cancelled context: %v", err)
		}
		certify(t, root, request(t, key)) // and does no harm
	})
	t.Run("requests that make no sense are refused", func(t *testing.T) {
		root := make(t)
		for name, spoil := range map[string]func(*ca.CertifyRequest){
			"no public key":    func(r *ca.CertifyRequest) { r.PublicKey = nil },
			"no public key 2":  func(r *ca.CertifyRequest) { r.PublicKey = "a key" },
			"no time":          func(r *ca.CertifyRequest) { r.NotAfter = r.NotBefore },
			"ends at its past": func(r *ca.CertifyRequest) { r.NotAfter = r.NotBefore.Add(-time.Hour) },
			"long past":        func(r *ca.CertifyRequest) { r.NotBefore, r.NotAfter = time.Unix(0, 0), time.Unix(3600, 0) },
		} {
			request := request(t, newKey(t))
			spoil(&request)
			if chain, err := root.Certify(t.Context(), request); err == nil {
				t.Errorf("%s: Certify returned a chain of %d", name, len(chain))
			}
		}
	})
	for name, fault := range faults {
		t.Run("with "+name+" it says so, and is well again by itself", func(t *testing.T) {
			root := make(t)
			rootWithout(t, root, fault(root))
		})
	}
	t.Run("Changed may be asked for at any time", func(t *testing.T) {
		root := make(t)
		first := root.Changed()
		if again := root.Changed(); first != again {
			t.Error("Changed gave two channels: a receiver on the first would wait for ever")
		}
	})
}

// request is an ordinary one.
func request(t *testing.T, key crypto.Signer) ca.CertifyRequest {
	t.Helper()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	return ca.CertifyRequest{PublicKey: key.Public(), CSR: csr, TrustDomain: TrustDomain, CommonName: "issuing CA",
		NotBefore: now.Add(-time.Minute), NotAfter: now.Add(lifetime)}
}

func certify(t *testing.T, root ca.Root, request ca.CertifyRequest) []*x509.Certificate {
	t.Helper()
	chain, err := root.Certify(t.Context(), request)
	if err != nil {
		t.Fatalf("Certify: %v", err)
	}
	if len(chain) == 0 {
		t.Fatal("Certify returned no certificate and no error")
	}
	return chain
}

func roots(t *testing.T, root ca.Root) []*x509.Certificate {
	t.Helper()
	all, err := root.Roots(t.Context())
	if err != nil {
		t.Fatalf("Roots: %v", err)
	}
	if len(all) == 0 {
		t.Fatal("Roots returned none and no error")
	}
	return all
}

// checkChain makes sure of all that makes a chain good to sign leaves with.
func checkChain(t *testing.T, root ca.Root, chain []*x509.Certificate, pub crypto.PublicKey) {
	t.Helper()
	cert := chain[0]
	if !ca.SameKey(cert.PublicKey, pub) {
		t.Error("the certificate is for another key")
	}
	if !cert.BasicConstraintsValid || !cert.IsCA {
		t.Error("the certificate is no CA's: basicConstraints cA is not true")
	}
	if cert.MaxPathLen != 0 || !cert.MaxPathLenZero {
		t.Errorf("the path length constraint is %d instead of 0 (RFC 5280 4.2.1.9)", cert.MaxPathLen)
	}
	if cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign {
		t.Errorf("the keyUsage is %#x instead of keyCertSign and cRLSign (%#x)", cert.KeyUsage, x509.KeyUsageCertSign|x509.KeyUsageCRLSign)
	}
	if len(cert.URIs) != 1 || cert.URIs[0].String() != "spiffe://"+TrustDomain {
		t.Errorf("the URI SANs are %v instead of spiffe://%s alone (X509-SVID 3.1)", cert.URIs, TrustDomain)
	}
	if len(cert.DNSNames)+len(cert.IPAddresses)+len(cert.EmailAddresses) != 0 {
		t.Errorf("the certificate has further names: %v %v %v", cert.DNSNames, cert.IPAddresses, cert.EmailAddresses)
	}
	if len(cert.ExtKeyUsage)+len(cert.UnknownExtKeyUsage) != 0 {
		t.Errorf("the extKeyUsage %v %v would limit what leaves may be for", cert.ExtKeyUsage, cert.UnknownExtKeyUsage)
	}
	if len(cert.SubjectKeyId) == 0 || len(cert.AuthorityKeyId) == 0 {
		t.Error("a key identifier is missing, of the subject or of the authority (RFC 5280 4.2.1.1 and 4.2.1.2)")
	}
	if cert.Subject.String() == "" {
		t.Error("the subject is empty (RFC 5280 4.1.2.6: a CA's must not be)")
	}

	anchors, intermediates := x509.NewCertPool(), x509.NewCertPool()
	all := roots(t, root)
	for _, anchor := range all {
		anchors.AddCert(anchor)
		if bytes.Equal(cert.RawSubject, anchor.RawSubject) {
			t.Errorf("the issuing CA has the name of the root (%s): verifiers would take it for self-issued", anchor.Subject)
		}
	}
	for _, link := range chain[1:] {
		intermediates.AddCert(link)
	}
	paths, err := cert.Verify(x509.VerifyOptions{Roots: anchors, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	if err != nil {
		t.Fatalf("the chain does not verify against Roots: %v", err)
	}
	for _, path := range paths {
		if !sameCertificates(path[:len(path)-1], chain) {
			continue
		}
		for i, issuer := range path[1:] {
			if path[i].NotAfter.After(issuer.NotAfter) {
				t.Errorf("%s outlives its issuer: %s is after %s", path[i].Subject, path[i].NotAfter, issuer.NotAfter)
			}
		}
		return
	}
	t.Error("the chain is not in order, or holds a root, or certificates that do not belong to it")
}

// issuingKeys are keys of the kinds that issuing CAs have.
func issuingKeys(t *testing.T) map[string]crypto.Signer {
	t.Helper()
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	rsa2048, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]crypto.Signer{"P-256": newKey(t), "P-384": p384, "RSA-2048": rsa2048}
}

func newKey(t *testing.T) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func sameCertificates(a, b []*x509.Certificate) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !a[i].Equal(b[i]) {
			return false
		}
	}
	return true
}
