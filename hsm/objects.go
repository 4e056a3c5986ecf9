//go:build cgo

package hsm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// foundKey is a private key on the token.
type foundKey struct {
	handle pkcs11.ObjectHandle
	data   keyData
}

// maxObjects is how many objects of a search are looked at.
const maxObjects = 4096

func (m *module) search(session pkcs11.SessionHandle, template ...*pkcs11.Attribute) (all []pkcs11.ObjectHandle, err error) {
	if err := m.ctx.FindObjectsInit(session, template); err != nil {
		return nil, failed("C_FindObjectsInit", err)
	}
	for len(all) < maxObjects {
		some, _, err := m.ctx.FindObjects(session, 64)
		if err != nil {
			_ = m.ctx.FindObjectsFinal(session) // the first error says what is wrong
			return nil, failed("C_FindObjects", err)
		}
		if len(some) == 0 {
			break
		}
		all = append(all, some...)
	}
	return all, failed("C_FindObjectsFinal", m.ctx.FindObjectsFinal(session))
}

// attribute asks for one attribute. Tokens leave out what they do not have: then it is nil. Any other error is the token's.
func (m *module) attribute(session pkcs11.SessionHandle, object pkcs11.ObjectHandle, kind uint) ([]byte, error) {
	got, err := m.ctx.GetAttributeValue(session, object, []*pkcs11.Attribute{pkcs11.NewAttribute(kind, nil)})
	var code pkcs11.Error
	if errors.As(err, &code) {
		switch code {
		case pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_ATTRIBUTE_SENSITIVE, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_FUNCTION_NOT_SUPPORTED:
			return nil, nil
		}
		return nil, failed("C_GetAttributeValue", err)
	}
	if err != nil || len(got) != 1 {
		return nil, err
	}
	return got[0].Value, nil
}

// privateKeys lists the private keys of a label, an id, or all, with what the token says of each.
func (m *module) privateKeys(session pkcs11.SessionHandle, label string, id []byte) (all []foundKey, err error) {
	template := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY)}
	if label != "" {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_LABEL, label))
	}
	if len(id) > 0 {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_ID, id))
	}
	handles, err := m.search(session, template...)
	if err != nil {
		return nil, err
	}
	if len(handles) == 0 && m.loggedIn { // tokens answer so, too, when the login was lost or they are away
		return nil, m.ping(session)
	}
	for _, handle := range handles {
		data, err := m.describe(session, handle)
		if err != nil {
			return nil, err
		}
		all = append(all, foundKey{handle, data})
	}
	return all, nil
}

func (m *module) describe(session pkcs11.SessionHandle, handle pkcs11.ObjectHandle) (k keyData, err error) {
	get := func(kind uint) (value []byte) {
		if err == nil {
			value, err = m.attribute(session, handle, kind)
		}
		return value
	}
	said := func(kind uint) Said {
		switch value := get(kind); {
		case len(value) != 1:
			return Unsaid
		case value[0] == 0:
			return No
		}
		return Yes
	}
	k.Label, k.ID = string(get(pkcs11.CKA_LABEL)), get(pkcs11.CKA_ID)
	kind := number(get(pkcs11.CKA_KEY_TYPE))
	k.Sign, k.Sensitive, k.Extractable = said(pkcs11.CKA_SIGN), said(pkcs11.CKA_SENSITIVE), said(pkcs11.CKA_EXTRACTABLE)
	k.NeverExtractable, k.AlwaysSensitive = said(pkcs11.CKA_NEVER_EXTRACTABLE), said(pkcs11.CKA_ALWAYS_SENSITIVE)
	k.Local, k.AlwaysAuthenticate = said(pkcs11.CKA_LOCAL), said(pkcs11.CKA_ALWAYS_AUTHENTICATE)
	var pub crypto.PublicKey
	switch kind {
	case pkcs11.CKK_EC:
		k.Type = "EC"
		pub = ecPublic(get(pkcs11.CKA_EC_PARAMS), get(pkcs11.CKA_EC_POINT))
	case pkcs11.CKK_RSA:
		k.Type = "RSA"
		pub = rsaPublic(get(pkcs11.CKA_MODULUS), get(pkcs11.CKA_PUBLIC_EXPONENT))
	default:
		k.Type = fmt.Sprintf("type %#x", kind)
	}
	if err != nil {
		return k, err
	}
	if pub == nil {
		if pub, err = m.publicOf(session, kind, k.Label, k.ID); err != nil {
			return k, err
		}
	}
	if pub != nil {
		if k.PublicDER, err = x509.MarshalPKIXPublicKey(pub); err != nil {
			return k, &failure{Reason: reasonModule, Text: fmt.Sprintf("%s: encoding its public key: %v", k, err)}
		}
		k.Spec = specOf(pub)
	}
	return k, nil
}

// publicOf finds the public half of a private key: a public key, or a certificate, of the same id, or without one of the same label.
func (m *module) publicOf(session pkcs11.SessionHandle, kind uint, label string, id []byte) (crypto.PublicKey, error) {
	same := pkcs11.NewAttribute(pkcs11.CKA_ID, id)
	if len(id) == 0 {
		same = pkcs11.NewAttribute(pkcs11.CKA_LABEL, label)
	}
	handles, err := m.search(session, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, kind), same)
	if err != nil {
		return nil, err
	}
	var found []crypto.PublicKey
	for _, handle := range handles {
		var pub crypto.PublicKey
		first, second := uint(pkcs11.CKA_EC_PARAMS), uint(pkcs11.CKA_EC_POINT)
		if kind == pkcs11.CKK_RSA {
			first, second = pkcs11.CKA_MODULUS, pkcs11.CKA_PUBLIC_EXPONENT
		}
		a, err := m.attribute(session, handle, first)
		if err != nil {
			return nil, err
		}
		b, err := m.attribute(session, handle, second)
		if err != nil {
			return nil, err
		}
		if kind == pkcs11.CKK_RSA {
			pub = rsaPublic(a, b)
		} else {
			pub = ecPublic(a, b)
		}
		if pub != nil {
			found = append(found, pub)
		}
	}
	if len(found) == 0 {
		if handles, err = m.search(session, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_CERTIFICATE), same); err != nil {
			return nil, err
		}
		for _, handle := range handles {
			der, err := m.attribute(session, handle, pkcs11.CKA_VALUE)
			if err != nil {
				return nil, err
			}
			if cert, err := x509.ParseCertificate(der); err == nil {
				found = append(found, cert.PublicKey)
			}
		}
	}
	if len(found) != 1 { // of several nobody knows which one belongs to it
		return nil, nil
	}
	return found[0], nil
}

// number reads a CK_ULONG, which is in the machine's own order.
func number(value []byte) (n uint) {
	if len(value) == int(unsafe.Sizeof(n)) {
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&n)), len(value)), value)
	}
	return n
}

var curves = map[string]elliptic.Curve{"1.2.840.10045.3.1.7": elliptic.P256(), "1.3.132.0.34": elliptic.P384()}

var curveParams = map[Spec][]byte{
	P256: {0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07},
	P384: {0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22},
}

// ecPublic reads CKA_EC_PARAMS, the OID of a curve, and CKA_EC_POINT, a DER OCTET STRING, or from some tokens the octets alone. It is nil for what is not known here.
func ecPublic(params, point []byte) crypto.PublicKey {
	var oid asn1.ObjectIdentifier
	if rest, err := asn1.Unmarshal(params, &oid); err != nil || len(rest) > 0 || len(point) == 0 {
		return nil
	}
	curve := curves[oid.String()]
	if curve == nil {
		return nil
	}
	var inner []byte
	if rest, err := asn1.Unmarshal(point, &inner); err == nil && len(rest) == 0 {
		point = inner
	}
	pub, err := ecdsa.ParseUncompressedPublicKey(curve, point)
	if err != nil {
		return nil
	}
	return pub
}

func rsaPublic(modulus, exponent []byte) crypto.PublicKey {
	e := new(big.Int).SetBytes(exponent)
	if len(modulus) == 0 || !e.IsInt64() || e.Int64() < 3 || e.Int64() > 1<<31-1 {
		return nil
	}
	return &rsa.PublicKey{N: new(big.Int).SetBytes(modulus), E: int(e.Int64())}
}

// find finds the one private key that belongs to a public key, or has the label and id.
func (m *module) find(session pkcs11.SessionHandle, r findRequest) (findReply, error) {
	m.objects.RLock()
	defer m.objects.RUnlock()
	all, err := m.privateKeys(session, r.Label, r.ID)
	if err != nil {
		return findReply{}, err
	}
	var fit []foundKey
	for _, key := range all {
		if len(r.Public) == 0 || bytes.Equal(key.data.PublicDER, r.Public) {
			fit = append(fit, key)
		}
	}
	switch {
	case len(fit) == 0 && len(all) == 0:
		return findReply{}, &failure{Reason: reasonNotFound, Text: "the token has no private key" + wanted(r.Label, r.ID)}
	case len(fit) == 0:
		return findReply{}, &failure{Reason: reasonNotFound, Text: fmt.Sprintf("of the token's %d private keys%s none belongs to the public key", len(all), wanted(r.Label, r.ID))}
	case len(fit) > 1:
		mend := "name one by its id, or remove the others"
		if len(r.Public) > 0 { // it is looked for wherever on the token it is
			mend = "remove the others"
		}
		return findReply{}, &failure{Reason: reasonAmbiguous, Text: fmt.Sprintf("%d private keys on the token fit, for instance %s and %s: %s", len(fit), fit[0].data, fit[1].data, mend)}
	}
	key := fit[0]
	switch {
	case key.data.AlwaysAuthenticate == Yes:
		return findReply{}, &failure{Reason: reasonRefused, Text: fmt.Sprintf("the %s wants the PIN for each signature (CKA_ALWAYS_AUTHENTICATE): make one that does not", key.data)}
	case key.data.Sign == No:
		return findReply{}, &failure{Reason: reasonRefused, Text: fmt.Sprintf("the %s may not sign (CKA_SIGN is false)", key.data)}
	case key.data.PublicDER == nil:
		return findReply{}, &failure{Reason: reasonRefused, Text: fmt.Sprintf("the token does not say the public half of the %s: put its public key or its certificate there, with the same id", key.data)}
	case key.data.Spec == "":
		return findReply{}, &failure{Reason: reasonRefused, Text: fmt.Sprintf("the %s is of a kind that CAs do not have: P-256, P-384 and RSA of 2048, 3072 or 4096 bits", key.data)}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	reference := slices.IndexFunc(m.keys, func(k signingKey) bool { return k.handle == key.handle && bytes.Equal(k.public, key.data.PublicDER) })
	if reference < 0 {
		reference = len(m.keys)
		m.keys = append(m.keys, signingKey{key.handle, key.data.PublicDER})
	}
	return findReply{uint32(reference), key.data}, nil
}

func wanted(label string, id []byte) (text string) {
	if label != "" {
		text += fmt.Sprintf(" with the label %q", label)
	}
	if len(id) > 0 {
		text += fmt.Sprintf(" with the id %x", id)
	}
	return text
}

func (m *module) list(session pkcs11.SessionHandle, r listRequest) ([]keyData, error) {
	m.objects.RLock()
	defer m.objects.RUnlock()
	all, err := m.privateKeys(session, r.Label, r.ID)
	keys := make([]keyData, 0, len(all))
	for _, key := range all {
		keys = append(keys, key.data)
	}
	return keys, err
}

// change does something to the token's objects, in a session of its own that may.
func (m *module) change(do func(session pkcs11.SessionHandle) error) error {
	m.objects.Lock()
	defer m.objects.Unlock()
	session, err := m.ctx.OpenSession(m.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return failed("C_OpenSession", err)
	}
	defer m.ctx.CloseSession(session)
	return do(session)
}

// halves finds the public keys of an id.
func (m *module) halves(session pkcs11.SessionHandle, id []byte) ([]pkcs11.ObjectHandle, error) {
	return m.search(session, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), pkcs11.NewAttribute(pkcs11.CKA_ID, id))
}

// generate makes a key pair, unless there is a private key with the label or the id, or a public one with the id: of two nobody would know which belongs to the private one.
func (m *module) generate(r generateRequest) error {
	return m.change(func(session pkcs11.SessionHandle) error {
		for _, by := range []listRequest{{Label: r.Label}, {ID: r.ID}} {
			there, err := m.privateKeys(session, by.Label, by.ID)
			if err != nil {
				return err
			}
			if len(there) > 0 {
				return &failure{Reason: reasonExists, Text: fmt.Sprintf("the token has the %s already: choose another label and id", there[0].data)}
			}
		}
		left, err := m.halves(session, r.ID)
		if err != nil {
			return err
		}
		if len(left) > 0 {
			return &failure{Reason: reasonExists, Text: fmt.Sprintf("the token has a public key with the id %x whose private key is gone or was never made: choose another label and id, or delete it with the token's tools", r.ID)}
		}
		public := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true), pkcs11.NewAttribute(pkcs11.CKA_LABEL, r.Label),
			pkcs11.NewAttribute(pkcs11.CKA_ID, r.ID)}
		private := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, true),
			pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false), pkcs11.NewAttribute(pkcs11.CKA_SIGN, true), pkcs11.NewAttribute(pkcs11.CKA_LABEL, r.Label),
			pkcs11.NewAttribute(pkcs11.CKA_ID, r.ID)}
		mechanism := pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)
		if params, ok := curveParams[r.Spec]; ok {
			public = append(public, pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, params))
		} else if bits := rsaBits[r.Spec]; bits > 0 {
			mechanism = pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil)
			public = append(public, pkcs11.NewAttribute(pkcs11.CKA_MODULUS_BITS, bits), pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}))
		} else {
			return &failure{Reason: reasonRequest, Text: fmt.Sprintf("the kind of key %q is unknown", r.Spec)}
		}
		_, _, err = m.ctx.GenerateKeyPair(session, []*pkcs11.Mechanism{mechanism}, public, private)
		return failed("C_GenerateKeyPair", err)
	})
}

var rsaBits = map[Spec]int{RSA2048: 2048, RSA3072: 3072, RSA4096: 4096}

// remove destroys the one private key of an id, and what the token has of its public half, also when an earlier deletion came only halfway. What is not there is no error.
func (m *module) remove(r deleteRequest) error {
	return m.change(func(session pkcs11.SessionHandle) error {
		keys, err := m.privateKeys(session, "", r.ID)
		if err != nil {
			return err
		}
		if len(keys) > 1 {
			return &failure{Reason: reasonAmbiguous, Text: fmt.Sprintf("%d private keys on the token fit, for instance %s and %s: nothing is deleted", len(keys), keys[0].data, keys[1].data)}
		}
		for _, key := range keys {
			if err := m.ctx.DestroyObject(session, key.handle); err != nil {
				return failed("C_DestroyObject", err)
			}
		}
		halves, err := m.halves(session, r.ID)
		if err != nil {
			return err
		}
		for _, handle := range halves {
			if err := m.ctx.DestroyObject(session, handle); err != nil {
				return failed("C_DestroyObject", err)
			}
		}
		return nil
	})
}
