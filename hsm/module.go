//go:build cgo

package hsm

import (
	"crypto"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// module is a PKCS#11 module with a login to one token. It lives in the child.
type module struct {
	ctx      *pkcs11.Ctx
	slot     uint
	flags    uint // of the token, when it was found
	sessions []pkcs11.SessionHandle
	loggedIn bool // there was a PIN

	objects sync.RWMutex // of the token: one that is deleted while it is looked at would seem a lost login

	mu   sync.RWMutex
	keys []signingKey // by reference
}

type signingKey struct {
	handle pkcs11.ObjectHandle
	public []byte // SubjectPublicKeyInfo
}

// failed says which function of the module failed, and how.
func failed(function string, err error) error {
	if err == nil {
		return nil
	}
	f := &failure{Reason: reasonModule, Function: function, Text: fmt.Sprintf("%s: %v", function, err)}
	var code pkcs11.Error
	if errors.As(err, &code) {
		f.Code = uint(code)
	}
	return f
}

func startModule(r startRequest) (started *module, info Info, err error) {
	m := &module{ctx: pkcs11.New(r.Module)}
	if m.ctx == nil {
		return nil, info, &failure{Reason: reasonToken, Text: fmt.Sprintf("the module %s cannot be loaded: see that the file is there, is a PKCS#11 module for this machine, and has the libraries that it needs (ldd)", r.Module)}
	}
	var options []pkcs11.InitializeOption
	if r.Parameters != "" {
		text := append([]byte(r.Parameters), 0)
		options = append(options, pkcs11.InitializeWithReserved(unsafe.Pointer(&text[0])))
	}
	if err := m.ctx.Initialize(options...); err != nil {
		return nil, info, failed("C_Initialize", err)
	}
	defer func() {
		if err != nil {
			m.finalize()
		}
	}()
	if info, err = m.choose(r); err != nil {
		return nil, info, err
	}
	if err := m.open(r.Sessions); err != nil {
		return nil, info, err
	}
	return m, info, nil
}

// choose finds the slot of the token by what the token says of itself.
func (m *module) choose(r startRequest) (info Info, err error) {
	slots, err := m.ctx.GetSlotList(true)
	if err != nil {
		return info, failed("C_GetSlotList", err)
	}
	trim := func(text string) string { return strings.TrimRight(text, " \x00") }
	fits := func(want, got string) bool { return want == "" || want == trim(got) }
	var found, others []string
	for _, slot := range slots {
		t, err := m.ctx.GetTokenInfo(slot)
		if err != nil {
			others = append(others, fmt.Sprintf("slot %d: %v", slot, err))
			continue
		}
		name := fmt.Sprintf("%q (serial %s)", trim(t.Label), trim(t.SerialNumber))
		if !fits(r.Token, t.Label) || !fits(r.Serial, t.SerialNumber) || !fits(r.Manufacturer, t.ManufacturerID) || !fits(r.Model, t.Model) || t.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			if t.Flags&pkcs11.CKF_TOKEN_INITIALIZED != 0 {
				others = append(others, name)
			}
			continue
		}
		found = append(found, name)
		m.slot, m.flags = slot, t.Flags
		info = Info{Label: trim(t.Label), Serial: trim(t.SerialNumber), Manufacturer: trim(t.ManufacturerID), Model: trim(t.Model), Module: r.Module,
			Firmware: fmt.Sprintf("%d.%d", t.FirmwareVersion.Major, t.FirmwareVersion.Minor)}
	}
	switch {
	case len(found) == 0 && len(others) == 0:
		return info, &failure{Reason: reasonToken, Text: "the module sees no token: see that it is plugged in, initialised, and that the module's own configuration names it"}
	case len(found) == 0:
		return info, &failure{Reason: reasonToken, Text: "the module does not see the token that is named; it sees " + strings.Join(others, ", ")}
	case len(found) > 1:
		return info, &failure{Reason: reasonToken, Text: "several tokens fit: " + strings.Join(found, ", ") + "; name one by serial="}
	}
	if library, err := m.ctx.GetInfo(); err == nil {
		info.Library = fmt.Sprintf("%s %d.%d", trim(library.LibraryDescription), library.LibraryVersion.Major, library.LibraryVersion.Minor)
	}
	mechanisms, err := m.ctx.GetMechanismList(m.slot)
	if err != nil {
		return info, failed("C_GetMechanismList", err)
	}
	for _, mechanism := range mechanisms {
		info.Mechanisms = append(info.Mechanisms, mechanism.Mechanism)
	}
	slices.Sort(info.Mechanisms)
	return info, nil
}

// open opens as many sessions as were asked for, or as many as the token allows.
func (m *module) open(sessions int) error {
	for range sessions {
		session, err := m.ctx.OpenSession(m.slot, pkcs11.CKF_SERIAL_SESSION)
		if err != nil && len(m.sessions) > 0 {
			return nil
		}
		if err != nil {
			return failed("C_OpenSession", err)
		}
		m.sessions = append(m.sessions, session)
	}
	return nil
}

// lockedText tells of a PIN that the token takes no more.
const lockedText = "the token has locked its PIN after too many wrong ones (to a TPM a loss of power after a login is one, too): unlock it with its own tools (a TPM unlocks itself after a while, " +
	"or with tpm2_dictionarylockout --clear-lockout)"

// login reads the PIN, tries it once, and wipes it. The copy of the binding is freed unwiped, in a process that does little else.
func (m *module) login(r loginRequest) (source sourceIdentity, err error) {
	switch {
	case m.flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return source, &failure{Reason: reasonLocked, Source: r.PINSource, Text: lockedText}
	case r.PINFile == "" && !r.PINPipe && m.flags&pkcs11.CKF_LOGIN_REQUIRED == 0:
		return source, nil
	case r.PINFile == "" && !r.PINPipe:
		return source, &failure{Reason: reasonPINSource, Text: "the token wants a PIN, and the URI has no pin-source: name a file, pin-source=file:/path"}
	}
	pin, source, err := pinOf(r)
	if err != nil {
		return source, &failure{Reason: reasonPINSource, Text: fmt.Sprintf("reading the PIN: %v", err)}
	}
	defer clear(pin)
	err = m.ctx.Login(m.sessions[0], pkcs11.CKU_USER, string(pin))
	var code pkcs11.Error
	if err == nil || errors.As(err, &code) && code == pkcs11.CKR_USER_ALREADY_LOGGED_IN {
		m.loggedIn = true
		return source, nil
	}
	switch code {
	case pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_EXPIRED:
		return source, &failure{Reason: reasonPIN, Function: "C_Login", Code: uint(code), Source: source, Text: fmt.Sprintf("the token refused the PIN (%v)", code)}
	case pkcs11.CKR_PIN_LOCKED:
		return source, &failure{Reason: reasonLocked, Function: "C_Login", Code: uint(code), Source: source, Text: lockedText}
	}
	return source, failed("C_Login", err)
}

func pinOf(r loginRequest) ([]byte, sourceIdentity, error) {
	if r.PINPipe {
		pipe := os.NewFile(pinDescriptor, "pin")
		defer pipe.Close()
		pin, err := readPIN(pipe)
		return pin, r.PINSource, err
	}
	file, source, err := openPINFile(r.PINFile)
	if err != nil {
		return nil, source, err
	}
	defer file.Close()
	pin, err := readPIN(file)
	if err != nil {
		err = fmt.Errorf("%s: %w", r.PINFile, err)
	}
	return pin, source, err
}

// ping makes sure that the token is there, and the session logged in if there was a PIN: SoftHSM's sessions outlive their token, and what tpm2-pkcs11 says of a TPM it says without asking
// that, but for random numbers.
func (m *module) ping(session pkcs11.SessionHandle) error {
	if _, err := m.ctx.GetTokenInfo(m.slot); err != nil {
		return failed("C_GetTokenInfo", err)
	}
	info, err := m.ctx.GetSessionInfo(session)
	if err != nil {
		return failed("C_GetSessionInfo", err)
	}
	if m.loggedIn && info.State != pkcs11.CKS_RO_USER_FUNCTIONS && info.State != pkcs11.CKS_RW_USER_FUNCTIONS {
		return &failure{Reason: reasonModule, Function: "C_GetSessionInfo", Code: pkcs11.CKR_USER_NOT_LOGGED_IN, Text: "the session is not logged in"}
	}
	if m.flags&pkcs11.CKF_RNG != 0 {
		_, err = m.ctx.GenerateRandom(session, 8)
	}
	return failed("C_GenerateRandom", err)
}

// finalize ends the module, once nobody calls it any more.
func (m *module) finalize() {
	if len(m.sessions) > 0 {
		_ = m.ctx.Logout(m.sessions[0])
		_ = m.ctx.CloseAllSessions(m.slot)
	}
	_ = m.ctx.Finalize()
	m.ctx.Destroy()
}

// digestInfo begins what PKCS #1 v1.5 signs (RFC 8017 9.2, note 1): the DER up to the digest.
var digestInfo = map[crypto.Hash][]byte{
	crypto.SHA256: {0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20},
	crypto.SHA384: {0x30, 0x41, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02, 0x05, 0x00, 0x04, 0x30},
	crypto.SHA512: {0x30, 0x51, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x03, 0x05, 0x00, 0x04, 0x40},
}

// pssHash is a hash in PSS: its mechanism, its mask generation function.
var pssHash = map[crypto.Hash][2]uint{
	crypto.SHA256: {pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256}, crypto.SHA384: {pkcs11.CKM_SHA384, pkcs11.CKG_MGF1_SHA384}, crypto.SHA512: {pkcs11.CKM_SHA512, pkcs11.CKG_MGF1_SHA512},
}

// sign signs a digest. What comes back is as PKCS#11 has it: for ECDSA r and s, one after the other.
func (m *module) sign(session pkcs11.SessionHandle, r signRequest, digest []byte) ([]byte, error) {
	m.mu.RLock()
	known := int(r.reference) < len(m.keys)
	var key pkcs11.ObjectHandle
	if known {
		key = m.keys[r.reference].handle
	}
	m.mu.RUnlock()
	if !known {
		return nil, &failure{Reason: reasonRequest, Text: "the key was not looked for in this generation"}
	}
	if !r.hash.Available() || len(digest) != r.hash.Size() {
		return nil, &failure{Reason: reasonRequest, Text: fmt.Sprintf("a digest of %d octets is not one of %v", len(digest), r.hash)}
	}
	var mechanism *pkcs11.Mechanism
	data := digest
	switch r.mechanism {
	case mechanismECDSA:
		mechanism = pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)
	case mechanismPKCS1:
		prefix, ok := digestInfo[r.hash]
		if !ok {
			return nil, &failure{Reason: reasonRequest, Text: fmt.Sprintf("PKCS#1 signatures with %v are not made", r.hash)}
		}
		mechanism, data = pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil), slices.Concat(prefix, digest)
	case mechanismPSS:
		hash, ok := pssHash[r.hash]
		if !ok {
			return nil, &failure{Reason: reasonRequest, Text: fmt.Sprintf("PSS signatures with %v are not made", r.hash)}
		}
		mechanism = pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_PSS, pkcs11.NewPSSParams(hash[0], hash[1], uint(r.salt)))
	default:
		return nil, &failure{Reason: reasonRequest, Text: fmt.Sprintf("unknown mechanism %d", r.mechanism)}
	}
	if err := m.ctx.SignInit(session, []*pkcs11.Mechanism{mechanism}, key); err != nil {
		return nil, failed("C_SignInit", err)
	}
	signature, err := m.ctx.Sign(session, data)
	if err != nil && r.mechanism == mechanismPSS {
		err = fmt.Errorf("%w: it was asked for RSA-PSS, which not every token makes; PKCS #1 v1.5 all do", err)
	}
	return signature, failed("C_Sign", err)
}
