package istio

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"kedge/ca/atomicfile"
)

// SVID is an X.509-SVID as its holder has it: with the key that was made for it, and the trust bundle that came along.
type SVID struct {
	ID           spiffeid.ID
	Certificates []*x509.Certificate // the leaf first
	Roots        []*x509.Certificate // the trust bundle
	Key          crypto.Signer
	ChainPEM     string // of Certificates
	BundlePEM    string // of Roots, as it came
	KeyPEM       string // PKCS#8
}

// Leaf is the SVID's own certificate.
func (s *SVID) Leaf() *x509.Certificate { return s.Certificates[0] }

// KeyTypes are those that NewKey makes.
var KeyTypes = []string{"P-256", "P-384", "RSA-2048"}

// NewKey makes a key of one of KeyTypes.
func NewKey(kind string) (crypto.Signer, error) {
	switch kind {
	case "P-256":
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "P-384":
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "RSA-2048":
		return rsa.GenerateKey(rand.Reader, 2048)
	}
	return nil, fmt.Errorf("the key type %q is none of %s", kind, strings.Join(KeyTypes, ", "))
}

// NewCSR makes a request for a certificate of the key, in PEM. It claims nothing: the identity comes from whoever asks.
func NewCSR(key crypto.Signer) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("making the CSR: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

// ErrUnverified: an SVID does not verify under the trust bundle that came with it, so that nobody who holds that would accept it.
var ErrUnverified = errors.New("it does not verify under the trust bundle that came with it")

// ReadSVID reads what a CA sent for a key, both in PEM. The error wraps ErrUnverified when it is an SVID, and does not verify at now. A machine that has just
// started may have its clock set yet: then it is judged as of its beginning.
func ReadSVID(key crypto.Signer, chain, bundle string, now time.Time) (*SVID, error) {
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding the key: %w", err)
	}
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
	svid, err := x509svid.Parse([]byte(chain), keyPEM)
	if err != nil {
		return nil, err
	}
	if begins := svid.Certificates[0].NotBefore; now.Before(begins) {
		now = begins
	}
	roots, err := x509bundle.Parse(svid.ID.TrustDomain(), []byte(bundle))
	if err == nil {
		_, _, err = x509svid.Verify(svid.Certificates, roots, x509svid.WithTime(now))
	}
	if err != nil {
		return nil, fmt.Errorf("%w (%w)", ErrUnverified, err)
	}
	return &SVID{ID: svid.ID, Certificates: svid.Certificates, Roots: roots.X509Authorities(), Key: key, ChainPEM: chain, BundlePEM: bundle, KeyPEM: string(keyPEM)}, nil
}

// The files of an SVID, named as istio-agent names them, so that their folder serves as its PROV_CERT.
const (
	ChainFile = "cert-chain.pem"
	KeyFile   = "key.pem"
	RootFile  = "root-cert.pem"
)

// Files are the SVID's files, name to contents.
func (s *SVID) Files() map[string][]byte {
	return map[string][]byte{KeyFile: []byte(s.KeyPEM), ChainFile: []byte(s.ChainPEM), RootFile: []byte(s.BundlePEM)}
}

// ReadClientCertificate reads the SVID in a folder of Files, as a client shows it.
func ReadClientCertificate(dir string) (*tls.Certificate, error) {
	files, err := atomicfile.ReadSet(dir, ChainFile, KeyFile)
	if err != nil {
		return nil, err
	}
	certificate, err := tls.X509KeyPair(files[ChainFile], files[KeyFile])
	if err != nil {
		return nil, fmt.Errorf("%s and %s in %s: %w", ChainFile, KeyFile, dir, err)
	}
	return &certificate, nil
}
