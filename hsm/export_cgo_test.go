//go:build cgo

package hsm

import (
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// loggedIn loads a module into the test's own process, and logs in.
func loggedIn(o Options, sessions int) (*module, error) {
	u := o.URI
	m, _, err := startModule(startRequest{Module: u.ModulePath, Parameters: o.Parameters, Token: u.Token, Serial: u.Serial, Sessions: sessions})
	if err != nil {
		return nil, err
	}
	_, err = m.login(loginRequest{PINFile: u.PINSource.File})
	return m, err
}

// InProcess loads a module into the test's own process, finds the key of a label, lets spoil do something to the module, and tells what a signature then fails with: whether that is taken
// for the request's own fault, and the code, which is 0 when it does not fail. again is what it fails with once the key is found again.
func InProcess(o Options, label string, spoil func(m *Module) error) (ofRequest bool, code uint, again, err error) {
	m, err := loggedIn(o, 1)
	if err != nil {
		return false, 0, nil, err
	}
	digest := sha256.Sum256(nil)
	var request signRequest
	sign := func() error {
		_, err := m.sign(m.sessions[0], request, digest[:])
		return err
	}
	find := func() error {
		reply, err := m.find(m.sessions[0], findRequest{Label: label})
		request = signRequest{reference: reply.Reference, mechanism: mechanismECDSA, hash: crypto.SHA256}
		if reply.Key.Type == "RSA" {
			request.mechanism = mechanismPKCS1
		}
		return err
	}
	if err = find(); err == nil {
		err = sign()
	}
	if err != nil {
		return false, 0, nil, fmt.Errorf("before anything was spoilt: %w", err)
	}
	if err := spoil(&Module{m, o}); err != nil {
		return false, 0, nil, err
	}
	err = sign()
	if again = find(); again == nil {
		again = sign()
	}
	_ = m.ctx.Finalize()
	var said *failure
	if !errors.As(err, &said) {
		return false, 0, again, err
	}
	return (&Error{Code: said.Code, reason: said.Reason}).ofRequest(), said.Code, again, nil
}

// Module is a module that a test spoils.
type Module struct {
	m *module
	o Options
}

// CloseSessions closes every session under it.
func (m *Module) CloseSessions() error { return m.m.ctx.CloseAllSessions(m.m.slot) }

// NewSession puts a session in the place of the first, which is not logged in once all others are closed.
func (m *Module) NewSession() error {
	if err := m.CloseSessions(); err != nil {
		return err
	}
	m.m.sessions = nil
	return m.m.open(1)
}

// LoginAgain is NewSession, and then a login.
func (m *Module) LoginAgain() error {
	if err := m.NewSession(); err != nil {
		return err
	}
	_, err := m.m.login(loginRequest{PINFile: m.o.URI.PINSource.File})
	return err
}

// Finalize finalises the module under it.
func (m *Module) Finalize() error { return m.m.ctx.Finalize() }

// Raw signs with a module that is loaded into this process, in as many goroutines as there are sessions, for so long, and tells how many signatures a second were made. With verify each is verified.
func Raw(o Options, label string, d time.Duration, verify bool) (perSecond float64, err error) {
	m, err := loggedIn(o, o.Sessions)
	if err != nil {
		return 0, err
	}
	defer m.finalize()
	reply, err := m.find(m.sessions[0], findRequest{Label: label})
	if err != nil {
		return 0, err
	}
	key, err := reply.Key.key()
	if err != nil {
		return 0, err
	}
	signer := &Signer{public: key.Public}
	request, err := signer.request(make([]byte, 32), crypto.SHA256)
	if err != nil {
		return 0, err
	}
	request.reference = reply.Reference
	var made atomic.Int64
	var failed atomic.Pointer[error]
	var running sync.WaitGroup
	began := time.Now()
	for i, session := range m.sessions {
		running.Go(func() {
			for n := uint64(0); time.Since(began) < d; n++ {
				digest := sha256.Sum256(binary.BigEndian.AppendUint64([]byte{byte(i)}, n))
				raw, err := m.sign(session, request, digest[:])
				if err == nil && verify {
					_, err = signer.verified(request, digest[:], raw)
				}
				if err != nil {
					failed.Store(&err)
					return
				}
				made.Add(1)
			}
		})
	}
	running.Wait()
	if err := failed.Load(); err != nil {
		return 0, *err
	}
	return float64(made.Load()) / time.Since(began).Seconds(), nil
}

// WithoutLogin loads a module into the test's own process, loses the login, and tells what finding, listing and deleting the key of a label then say.
func WithoutLogin(o Options, label string) map[string]error {
	m, err := loggedIn(o, 1)
	if err == nil {
		err = (&Module{m, o}).NewSession()
	}
	if err != nil {
		return map[string]error{"before": &Error{text: err.Error(), reason: reasonNotFound}}
	}
	defer m.finalize()
	answers := map[string]error{}
	said := func(what string, err error) {
		var f *failure
		if errors.As(err, &f) {
			err = &Error{text: f.Text, reason: f.Reason}
		}
		answers[what] = err
	}
	_, err = m.find(m.sessions[0], findRequest{Label: label})
	said("find", err)
	_, err = m.list(m.sessions[0], listRequest{Label: label})
	said("list", err)
	said("delete", m.remove(deleteRequest{ID: []byte(label)}))
	return answers
}
