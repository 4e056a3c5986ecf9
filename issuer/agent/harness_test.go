package agent

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kedge/issuer/istio"
	"kedge/issuer/sds"
)

// authority is a CA without a network, whose clock is right.
type authority struct {
	t    *testing.T
	key  crypto.Signer
	root *x509.Certificate
	ttl  time.Duration

	mu     sync.Mutex
	number sds.Number // of its bundle
	refuse func(with shown) error
	calls  []call
}

type call struct {
	at   time.Time
	with shown
}

func newAuthority(t *testing.T, ttl time.Duration) *authority {
	t.Helper()
	key, err := istio.NewKey("P-256")
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: rand.Text()}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(10 * 365 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{t: t, key: key, root: root, ttl: ttl, number: sds.Number{Incarnation: "a", Sequence: 1}}
}

func (a *authority) bundle() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.root.Raw}))
}

// ask issues an SVID, as the CSR API does.
func (a *authority) ask(_ context.Context, with shown) (*answer, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	a.calls = append(a.calls, call{now, with})
	if a.refuse != nil {
		if err := a.refuse(with); err != nil {
			return nil, err
		}
	}
	key, err := istio.NewKey("P-256")
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(int64(len(a.calls)) + 1), URIs: []*url.URL{{Scheme: "spiffe", Host: "cluster.local", Path: "/ns/default/sa/web"}},
		NotBefore: now, NotAfter: now.Add(a.ttl), KeyUsage: x509.KeyUsageDigitalSignature}
	der, err := x509.CreateCertificate(rand.Reader, template, a.root, key.Public(), a.key)
	if err != nil {
		return nil, err
	}
	svid, err := istio.ReadSVID(key, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), a.bundle(), now)
	if err != nil {
		return nil, err
	}
	return &answer{SVID: svid, number: a.number, asked: now}, nil
}

func (a *authority) refusing(refuse func(with shown) error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.refuse = refuse
}

// asked are the calls so far.
func (a *authority) asked() []call {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]call{}, a.calls...)
}

// bench is an identity in a synctest bubble, with a wall clock that can be moved.
type bench struct {
	*identity
	ca     *authority
	offset atomic.Int64 // of the wall clock
	token  string       // its file
	log    *bytes.Buffer
}

// newBench makes an identity with the token "first". keep does not run yet.
func newBench(t *testing.T, ttl time.Duration) *bench {
	t.Helper()
	b := &bench{ca: newAuthority(t, ttl), token: filepath.Join(t.TempDir(), "token"), log: &bytes.Buffer{}}
	roots := filepath.Join(t.TempDir(), "root.pem")
	write(t, b.token, "first")
	write(t, roots, b.ca.bundle())
	o := &Options{RootFile: roots, KeyType: "P-256", Grace: time.Minute, Logger: slog.New(slog.NewTextHandler(b.log, nil)),
		Now: func() time.Time { return time.Now().Add(time.Duration(b.offset.Load())) }}
	b.identity = newIdentity(o, Workload{Name: "web", TokenFile: b.token})
	b.ask = b.ca.ask
	return b
}

// start runs keep until the test ends, or stop is called.
func (b *bench) start(t *testing.T) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		b.keep(ctx)
		close(ended)
	}()
	stop = func() {
		cancel()
		<-ended
	}
	t.Cleanup(stop)
	synctest.Wait()
	return stop
}

// pass lets time pass.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

// jump moves the wall clock, and no time passes but that until it is looked at.
func (b *bench) jump(d time.Duration) {
	b.offset.Add(int64(d))
	pass(look)
}

func (i *identity) handed() *sds.SVID {
	m, _ := i.materials()
	return m.SVID
}

func (b *bench) said(text string) int { return strings.Count(b.log.String(), text) }

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
