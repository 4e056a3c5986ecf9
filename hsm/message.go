package hsm

import (
	"crypto"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"time"
)

// The messages between parent and child. All but those of a signature are JSON.

type startRequest struct {
	Module       string
	Parameters   string // reserved argument of C_Initialize
	Token        string
	Serial       string
	Manufacturer string
	Model        string
	Sessions     int
}

type loginRequest struct {
	PINFile   string // "" when the PIN comes otherwise, or there is none
	PINPipe   bool   // it comes through the descriptor pinDescriptor
	PINSource sourceIdentity
}

type findRequest struct {
	Public []byte // SubjectPublicKeyInfo, DER
	Label  string
	ID     []byte
}

type findReply struct {
	Reference uint32 // names the key in signatures of this generation
	Key       keyData
}

type listRequest struct {
	Label string
	ID    []byte
}

type generateRequest struct {
	Spec  Spec
	Label string
	ID    []byte
}

type deleteRequest struct {
	ID []byte
}

// keyData is a Key on its way.
type keyData struct {
	Key
	PublicDER []byte // SubjectPublicKeyInfo; nil when the token does not say
}

// signRequest is the payload of kindSign. What is signed is the frame's digest.
type signRequest struct {
	reference uint32
	mechanism mechanism
	hash      crypto.Hash
	salt      uint16 // octets, for PSS
}

type mechanism byte

const (
	mechanismECDSA mechanism = iota + 1
	mechanismPKCS1
	mechanismPSS
)

func (s signRequest) encode() []byte {
	b := binary.BigEndian.AppendUint32(make([]byte, 0, 8), s.reference)
	b = append(b, byte(s.mechanism), byte(s.hash))
	return binary.BigEndian.AppendUint16(b, s.salt)
}

func decodeSignRequest(b []byte) (signRequest, error) {
	if len(b) != 8 {
		return signRequest{}, fmt.Errorf("a request for a signature has %d octets instead of 8", len(b))
	}
	return signRequest{binary.BigEndian.Uint32(b), mechanism(b[4]), crypto.Hash(b[5]), binary.BigEndian.Uint16(b[6:])}, nil
}

// failure is what the child answers when it cannot do what was asked.
type failure struct {
	Reason   reason
	Function string `json:",omitempty"` // of PKCS#11, when it was one that failed
	Code     uint   `json:",omitempty"` // CK_RV
	Text     string
	Source   sourceIdentity // of the PIN that was refused
}

type reason string

const (
	reasonModule    reason = "module"     // the module's code says what
	reasonNotFound  reason = "not-found"  // no such key
	reasonAmbiguous reason = "ambiguous"  // several
	reasonExists    reason = "exists"     // one that was to be made
	reasonRefused   reason = "refused"    // a key that must not or cannot be used
	reasonToken     reason = "token"      // no such token, or one that cannot be used
	reasonPINSource reason = "pin-source" // the PIN cannot be read
	reasonPIN       reason = "pin"        // the token refused the PIN
	reasonLocked    reason = "locked"     // the token takes no PIN any more
	reasonRequest   reason = "request"    // what was asked makes no sense
)

// What callers branch on, with errors.Is.
var (
	ErrNotFound    = errors.New("no such key on the token")
	ErrAmbiguous   = errors.New("several keys fit")
	ErrExists      = errors.New("such a key exists already")
	ErrRefused     = errors.New("the key cannot be used")
	ErrWrongPIN    = errors.New("the token refused the PIN")
	ErrUnavailable = errors.New("the token cannot be used now") // and perhaps later
	ErrClosed      = errors.New("the token is closed")
)

// Error is what a module or the child that it lives in answered.
type Error struct {
	Function string // of PKCS#11; "" when the error is not a function's
	Code     uint   // CK_RV; 0 when the error is not a function's
	text     string
	reason   reason
	source   sourceIdentity // of a PIN that was refused
}

func (e *Error) Error() string { return e.text }

// Is makes the sentinels of this package errors that an Error can be.
func (e *Error) Is(target error) bool {
	switch target {
	case ErrNotFound:
		return e.reason == reasonNotFound
	case ErrAmbiguous:
		return e.reason == reasonAmbiguous
	case ErrExists:
		return e.reason == reasonExists
	case ErrRefused:
		return e.reason == reasonRefused
	case ErrWrongPIN:
		return e.reason == reasonPIN
	}
	return false
}

// Codes of PKCS#11 that are told apart.
const (
	codeGeneralError         = 0x05
	codeFunctionFailed       = 0x06
	codeDeviceError          = 0x30
	codeDeviceMemory         = 0x31
	codeDeviceRemoved        = 0x32
	codeTokenWriteProtected  = 0xE2
	codeFunctionNotSupported = 0x54
	codePINLocked            = 0xA4
)

// ofRequest says whether the failure is the request's own fault, so that another generation would answer the same. Modules use codes so
// differently that everything that is not surely about the request is not: a key that was found is of the right kind and may sign, so that KEY_TYPE_INCONSISTENT and
// KEY_FUNCTION_NOT_PERMITTED say that it was lost, which NSS does when a session ends under a signature.
func (e *Error) ofRequest() bool {
	switch e.reason {
	case reasonNotFound, reasonAmbiguous, reasonExists, reasonRefused, reasonRequest:
		return true
	case reasonModule:
	default:
		return false
	}
	switch e.Code {
	case 0x10, 0x11, 0x12, 0x13, // ATTRIBUTE_READ_ONLY, _SENSITIVE, _TYPE_INVALID, _VALUE_INVALID
		0x1B,       // ACTION_PROHIBITED
		0x20, 0x21, // DATA_INVALID, DATA_LEN_RANGE
		codeFunctionNotSupported, //
		0x62,                     // KEY_SIZE_RANGE
		0x70, 0x71,               // MECHANISM_INVALID, MECHANISM_PARAM_INVALID
		0xD0, 0xD1, // TEMPLATE_INCOMPLETE, TEMPLATE_INCONSISTENT
		0x130, 0x140, // DOMAIN_PARAMS_INVALID, CURVE_NOT_SUPPORTED
		codeTokenWriteProtected:
		return true
	}
	return false
}

// Said is what a token says about a key: yes, no, or nothing.
type Said byte

const (
	Unsaid Said = iota
	No
	Yes
)

func (s Said) String() string { return [...]string{"not said", "no", "yes"}[s%3] }

// MarshalText writes it as String does.
func (s Said) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads what String writes.
func (s *Said) UnmarshalText(text []byte) error {
	for said := Unsaid; said <= Yes; said++ {
		if said.String() == string(text) {
			*s = said
			return nil
		}
	}
	return fmt.Errorf("%q is none of yes, no, not said", text)
}

// Spec is a kind of key.
type Spec string

// The kinds that Generate makes.
const (
	P256    Spec = "P-256"
	P384    Spec = "P-384"
	RSA2048 Spec = "RSA-2048"
	RSA3072 Spec = "RSA-3072"
	RSA4096 Spec = "RSA-4096"
)

// Key is a private key as the token reports it. Nothing in it is guessed.
type Key struct {
	Label  string
	ID     HexBytes
	Type   string           // "EC" or "RSA", or the number that the token gives
	Spec   Spec             // "" when it is none that is known here
	Public crypto.PublicKey `json:"-"` // nil when the token does not say

	Sign               Said // may sign
	Sensitive          Said
	Extractable        Said
	NeverExtractable   Said
	AlwaysSensitive    Said
	Local              Said // made on the token
	AlwaysAuthenticate Said // wants the PIN for each signature
}

// String names the key for people.
func (k Key) String() string {
	name := string(k.Spec)
	if name == "" {
		name = k.Type
	}
	return fmt.Sprintf("%s key %q with id %s", name, k.Label, k.ID)
}

// HexBytes are octets that are written in hexadecimal digits.
type HexBytes []byte

func (h HexBytes) String() string {
	if len(h) == 0 {
		return "none"
	}
	return hex.EncodeToString(h)
}

// MarshalText writes hexadecimal digits.
func (h HexBytes) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(h)), nil }

// UnmarshalText reads hexadecimal digits.
func (h *HexBytes) UnmarshalText(text []byte) error {
	b, err := hex.DecodeString(string(text))
	*h = b
	return err
}

// Info is what a token and its module say about themselves.
type Info struct {
	Label        string
	Serial       string
	Manufacturer string
	Model        string
	Firmware     string // version
	Module       string // path
	Library      string // what the module calls itself, with its version
	Mechanisms   []uint // CKM_ numbers, ascending
}

// sourceIdentity says which state of a PIN source was used: that of a file by its inode and the time of its last change. Never anything of the PIN.
type sourceIdentity struct {
	Source   string
	Device   uint64
	Inode    uint64
	Modified time.Time
}

func (s sourceIdentity) equal(o sourceIdentity) bool {
	return s.Source == o.Source && s.Device == o.Device && s.Inode == o.Inode && s.Modified.Equal(o.Modified)
}
