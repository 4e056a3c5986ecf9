package ledger

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"
)

// Hash is a SHA-256 digest. It prints, and travels in JSON, as 64 lower-case hex digits.
type Hash [32]byte

func (h Hash) String() string               { return hex.EncodeToString(h[:]) }
func (h Hash) IsZero() bool                 { return h == Hash{} }
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText reads 64 hex digits.
func (h *Hash) UnmarshalText(text []byte) error {
	if len(text) != 2*len(h) {
		return fmt.Errorf("a SHA-256 digest has %d hex digits, not %d", 2*len(h), len(text))
	}
	_, err := hex.Decode(h[:], text)
	return err
}

// Serial is the serial number of a certificate: the big-endian octets of the positive integer (RFC 5280 4.1.2.2), without leading zeros.
// It prints, and travels in JSON, as lower-case hex.
type Serial []byte

func (s Serial) String() string               { return hex.EncodeToString(s) }
func (s Serial) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads hex digits, with or without the colons that openssl prints, and drops leading zeros.
func (s *Serial) UnmarshalText(text []byte) error {
	v, err := ParseSerial(string(text))
	*s = v
	return err
}

// Type says what an event is about. It is part of the stored format: values are never renumbered.
type Type uint8

// The types of this version, and those that are not written yet, whose numbers are reserved here.
const (
	TypeIssue     Type = 1 // a certificate was handed out
	TypeConfirm   Type = 2 // its holder was seen to have it
	TypeAuthority Type = 3 // an authority changed its state
	TypeBundle    Type = 4 // a new trust bundle, and with it perhaps a new floor
	TypeToken     Type = 5 // a join token was made
	TypeRevoke    Type = 6 // a certificate was revoked
	TypeWaiver    Type = 7 // an admin vouched for what a gate could not know
	TypeForce     Type = 8
	TypeRestore   Type = 9 // a new log begins in a restored file
	TypeConsumer  Type = 10
)

var typeNames = map[Type]string{
	TypeIssue: "issue", TypeConfirm: "confirm", TypeAuthority: "authority", TypeBundle: "bundle", TypeToken: "token",
	TypeRevoke: "revoke", TypeWaiver: "waiver", TypeForce: "force", TypeRestore: "restore", TypeConsumer: "consumer",
}

func (t Type) String() string {
	if name, ok := typeNames[t]; ok {
		return name
	}
	return fmt.Sprintf("type-%d", uint8(t))
}

// MarshalText gives the name of the type.
func (t Type) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// UnmarshalText reads the name of a type.
func (t *Type) UnmarshalText(text []byte) error {
	for typ, name := range typeNames {
		if name == string(text) {
			*t = typ
			return nil
		}
	}
	return fmt.Errorf("unknown event type %q", text)
}

// Time is an instant in whole seconds since 1970, UTC, as X.509 counts. It travels in JSON as RFC 3339.
type Time int64

// At rounds t down to the second.
func At(t time.Time) Time { return Time(t.Unix()) }

func (t Time) Time() time.Time              { return time.Unix(int64(t), 0).UTC() }
func (t Time) String() string               { return t.Time().Format(time.RFC3339) }
func (t Time) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

// UnmarshalText reads RFC 3339.
func (t *Time) UnmarshalText(text []byte) error {
	v, err := time.Parse(time.RFC3339, string(text))
	*t = At(v)
	return err
}

// Body is what an event says. Bodies hold no secret: no key, no token.
type Body interface {
	Type() Type
}

// Event is one entry of the ledger as it is read back.
type Event struct {
	Version uint8  // of the envelope: 1
	Type    Type   //
	Time    Time   // when it was appended; never earlier than the event before it
	Log     LogID  // the log that numbered it
	Number  uint64 // from 1, without gaps within one log
	Body    Body   // *Issue, *Confirm, …; *Unknown for a type that a later version wrote
}

// MarshalJSON gives one flat object: the envelope's fields, and the body under the name of its type.
func (e Event) MarshalJSON() ([]byte, error) {
	return json.Marshal(map[string]any{
		"version": e.Version, "type": e.Type, "time": e.Time, "log": e.Log, "number": e.Number, e.Type.String(): e.Body,
	})
}

// LogID names a log: 16 random octets made with the data folder. It prints as hex.
type LogID [16]byte

func (l LogID) String() string               { return hex.EncodeToString(l[:]) }
func (l LogID) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText reads 32 hex digits.
func (l *LogID) UnmarshalText(text []byte) error {
	if len(text) != 2*len(l) {
		return fmt.Errorf("a log's id has %d hex digits, not %d", 2*len(l), len(text))
	}
	_, err := hex.Decode(l[:], text)
	return err
}

// Delivery says how the bundle named in an Issue reaches the holder, and with that, under which bundle the certificate counts in the holdings: one that goes out
// in a response counts under the bundle next to it. One that goes out by SDS says nothing of the bundle, which is another resource: it counts
// under what its holder is known to have (Issue.Held), and under 0 while that is not known.
type Delivery uint8

const (
	DeliveryResponse Delivery = 1 // in the same response as the certificate
	DeliverySDS      Delivery = 2 // on the holder's own SDS stream
	DeliveryOther    Delivery = 3 // by something that this log knows as a consumer
	DeliverySelf     Delivery = 4 // the holder is this CA: its serving certificate
)

var deliveryNames = map[Delivery]string{
	DeliveryResponse: "response", DeliverySDS: "sds", DeliveryOther: "other", DeliverySelf: "self",
}

// MarshalText gives the name of the way.
func (d Delivery) MarshalText() ([]byte, error) { return []byte(deliveryNames[d]), nil }

// UnmarshalText reads the name of a way; an unknown one is 0.
func (d *Delivery) UnmarshalText(text []byte) error {
	*d = 0
	for way, name := range deliveryNames {
		if name == string(text) {
			*d = way
		}
	}
	return nil
}

// Proof says how a caller proved who it is.
type Proof struct {
	Method  string `cbor:"1,keyasint" json:"method"`                      // kubernetes, oidc, join-token, client-certificate, admin, self
	Issuer  string `cbor:"2,keyasint,omitempty" json:"issuer,omitempty"`  // who vouches: the token issuer's configured name, or the authority's id
	Subject string `cbor:"3,keyasint,omitempty" json:"subject,omitempty"` // the caller as the issuer names it: "sub", or the presented serial
	Time    Time   `cbor:"4,keyasint" json:"time"`                        // when it was accepted
}

// MethodClientCertificate is the method of a proof whose subject is the serial number of the certificate that was presented.
const MethodClientCertificate = "client-certificate"

// Holder says who holds a certificate, so that its successor can be told from a stranger's.
type Holder struct {
	Kind string `cbor:"1,keyasint" json:"kind"` // pod, lineage, install, self
	ID   string `cbor:"2,keyasint" json:"id"`   // pod UID; number of the first certificate of the lineage; id of the install
}

// Issue records a certificate that was handed out. Appending it is refused unless, in the same commit, its authority is
// active and not tainted, its bundle exists and is not below the floor, its join token (if any) may still be redeemed, and neither the certificate that
// it replaces is revoked nor a client certificate among its proofs.
type Issue struct {
	Serial      Serial   `cbor:"1,keyasint" json:"serial"`
	Certificate Hash     `cbor:"2,keyasint" json:"certificate"` // SHA-256 of the DER
	SPIFFEID    string   `cbor:"3,keyasint,omitempty" json:"spiffe_id,omitempty"`
	Names       []string `cbor:"4,keyasint,omitempty" json:"names,omitempty"` // DNS names and IPs of a serving certificate, which has no SPIFFE ID
	Key         Hash     `cbor:"5,keyasint" json:"key"`                       // SHA-256 of the SubjectPublicKeyInfo
	NotBefore   Time     `cbor:"6,keyasint" json:"not_before"`
	NotAfter    Time     `cbor:"7,keyasint" json:"not_after"`
	Authority   Hash     `cbor:"8,keyasint" json:"authority"` // the issuing CA that signed: SHA-256 of its certificate
	Chain       Hash     `cbor:"9,keyasint" json:"chain"`     // SHA-256 over the chain's DERs, see ChainHash
	Bundle      uint64   `cbor:"10,keyasint" json:"bundle"`   // sequence number of the bundle handed over; by SDS: of the one there was then
	Delivery    Delivery `cbor:"11,keyasint" json:"delivery"`
	Profile     string   `cbor:"12,keyasint,omitempty" json:"profile,omitempty"`
	Proofs      []Proof  `cbor:"13,keyasint" json:"proofs"`                           // what was accepted for this call
	FirstProof  *Proof   `cbor:"14,keyasint,omitempty" json:"first_proof,omitempty"`  // where the lineage began, when that is not in Proofs
	Holder      Holder   `cbor:"15,keyasint" json:"holder"`                           //
	Replaces    uint64   `cbor:"16,keyasint,omitempty" json:"replaces,omitempty"`     // number of the certificate that this one follows; 0: none
	Token       string   `cbor:"17,keyasint,omitempty" json:"token,omitempty"`        // id (never the text) of the join token that it spends
	RequestID   string   `cbor:"18,keyasint,omitempty" json:"request_id,omitempty"`   // the same as in the logs
	Peer        string   `cbor:"19,keyasint,omitempty" json:"peer,omitempty"`         // network address of the caller
	ClampedFrom int64    `cbor:"20,keyasint,omitempty" json:"clamped_from,omitempty"` // seconds that were asked for, when more than granted
	ClusterID   string   `cbor:"21,keyasint,omitempty" json:"cluster_id,omitempty"`   // the caller's own word, not checked
	// Supersedes is filled in by the ledger: the number of the issue that the same single-use token got before, 0 for none. From this event on that
	// certificate authenticates nobody, and is never confirmed. It may be in somebody's hands, so that it counts until it expires.
	Supersedes uint64 `cbor:"22,keyasint,omitempty" json:"supersedes,omitempty"`
	// Held is filled in by the ledger, for a certificate that goes out by SDS: the sequence number of the bundle that its holder is known to have already, 0
	// when none is known. It is what the certificate that this one replaces counts under, if that went out to the same Holder by SDS, too, was not
	// superseded, and is for the same name: a holder keeps what it acknowledged, and never goes back. A Confirm that comes for the older one afterwards does not change it.
	Held uint64 `cbor:"23,keyasint,omitempty" json:"held,omitempty"`
}

// Confirm records that the holder of an issued certificate was seen to have it: it presented the serial, or acknowledged it. With a Bundle it says
// as well which trust bundle the holder has, so that the certificate counts under that one in the holdings from this event on. It comes once for the
// certificate, and once more for each newer bundle.
//
// The first one retires the certificate that the confirmed one replaces from the holdings, if that went out in the same way and, by SDS, to the same Holder; else
// it may be in use elsewhere, with what that place has as its trust. One that was superseded is never retired.
//
// It is refused with ErrAlready when it says nothing new: the bundle is not newer than the one that the certificate counts under, and the holder was seen to
// have the certificate before, or the bundle is an older one; with ErrNotFound when there is no such issue, as when it was pruned, or no such
// bundle; and with ErrSuperseded for a superseded certificate, of which nobody knows who has it. For a certificate that was retired, or whose hour Prune dropped
// from the holdings, it is recorded, and changes no count. A bundle below the floor is accepted: it is what the holder has.
type Confirm struct {
	Number uint64 `cbor:"1,keyasint" json:"number"` // of the Issue event
	Serial Serial `cbor:"2,keyasint" json:"serial"`
	How    string `cbor:"3,keyasint" json:"how"` // client-certificate, sds-ack
	// Retires is filled in by the ledger: the number of the issue that no longer counts, 0 for none.
	Retires uint64 `cbor:"4,keyasint,omitempty" json:"retires,omitempty"`
	// Bundle is the sequence number of the trust bundle that the holder has from now on, at least; 0: nothing is said of it.
	Bundle uint64 `cbor:"5,keyasint,omitempty" json:"bundle,omitempty"`
}

// State of an authority. The ways are prepared → active → retired → removed, and prepared → removed; and back, for one that is not tainted: retired →
// active and removed → prepared, when an admin puts back what was replaced.
type State uint8

const (
	StatePrepared State = 1 // trusted, not signing
	StateActive   State = 2 // signing
	StateRetired  State = 3 // trusted, no longer signing leaves
	StateRemoved  State = 4
)

var stateNames = map[State]string{0: "none", StatePrepared: "prepared", StateActive: "active", StateRetired: "retired", StateRemoved: "removed"}

func (s State) String() string               { return stateNames[s] }
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads the name of a state.
func (s *State) UnmarshalText(text []byte) error {
	for state, name := range stateNames {
		if name == string(text) {
			*s = state
			return nil
		}
	}
	return fmt.Errorf("unknown authority state %q", text)
}

// Role of an authority.
type Role uint8

const (
	RoleRoot    Role = 1 // a trust anchor
	RoleIssuing Role = 2 // signs leaves
)

var roleNames = map[Role]string{RoleRoot: "root", RoleIssuing: "issuing"}

func (r Role) String() string               { return roleNames[r] }
func (r Role) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads the name of a role.
func (r *Role) UnmarshalText(text []byte) error {
	for role, name := range roleNames {
		if name == string(text) {
			*r = role
			return nil
		}
	}
	return fmt.Errorf("unknown authority role %q", text)
}

// Coverage says what this log knows of the certificates under an authority.
type Coverage struct {
	Kind  string `cbor:"1,keyasint" json:"kind"`                      // complete: all of them; since: all from Since on; foreign: not
	Since Time   `cbor:"2,keyasint,omitempty" json:"since,omitempty"` // of foreign: the latest restore, up to which this CA signed what the log does not know, too; 0: there was none
	// Until is when the last certificate has expired that others signed and the log does not know, as an admin states for foreign; 0: nobody says, so it is the authority's own end.
	Until Time `cbor:"3,keyasint,omitempty" json:"until,omitempty"`
}

// Complete says whether the log has every certificate under the authority, whenever it was signed.
func (c Coverage) Complete() bool { return c.Kind == "complete" }

// Knows says whether the log has every certificate under the authority that was signed at that time.
func (c Coverage) Knows(signed Time) bool {
	return c.Complete() || c.Kind == "since" && signed >= c.Since
}

// Authority records a transition of an authority, and carries the whole authority when it enters the log (From = 0).
// The transition is refused unless the authority is in state From in the same commit.
type Authority struct {
	ID          Hash     `cbor:"1,keyasint" json:"id"` // SHA-256 of the certificate
	TrustDomain string   `cbor:"2,keyasint" json:"trust_domain"`
	From        State    `cbor:"3,keyasint" json:"from"` // 0: it was not known
	To          State    `cbor:"4,keyasint" json:"to"`
	Tainted     bool     `cbor:"5,keyasint,omitempty" json:"tainted,omitempty"` // compromised; once true it stays so. A taint alone has From = To
	Reason      string   `cbor:"6,keyasint,omitempty" json:"reason,omitempty"`
	By          string   `cbor:"7,keyasint,omitempty" json:"by,omitempty"`        // "kedge", or the admin's peer credentials
	Record      *Founded `cbor:"8,keyasint,omitempty" json:"authority,omitempty"` // present exactly when From is 0
}

// Founded is what an authority is from its first day on. It never changes, but for the coverage, which a Restore cuts short.
type Founded struct {
	Kind        string   `cbor:"1,keyasint" json:"kind"` // x509
	Role        Role     `cbor:"2,keyasint" json:"role"`
	Key         Hash     `cbor:"3,keyasint" json:"key"`                         // SHA-256 of the SubjectPublicKeyInfo: two certificates may share a key
	Certificate []byte   `cbor:"4,keyasint" json:"certificate"`                 // DER
	Chain       [][]byte `cbor:"5,keyasint,omitempty" json:"chain,omitempty"`   // DER: what is handed out with a leaf, own certificate first, root not included
	Root        Hash     `cbor:"6,keyasint,omitempty" json:"root,omitempty"`    // id of the root that an issuing CA chains to
	KeyRef      string   `cbor:"7,keyasint,omitempty" json:"key_ref,omitempty"` // where the key store finds the key; empty: not ours to use
	Coverage    Coverage `cbor:"8,keyasint" json:"coverage"`                    //
}

// Bundle records a trust bundle: immutable, and numbered from 1 within a trust domain, without gaps but for one at each Restore.
type Bundle struct {
	TrustDomain string   `cbor:"1,keyasint" json:"trust_domain"`
	Sequence    uint64   `cbor:"2,keyasint" json:"sequence"`
	Incarnation Hash     `cbor:"3,keyasint" json:"incarnation"` // filled in by the ledger: of the store that made it
	SHA256      Hash     `cbor:"4,keyasint" json:"sha256"`      // of the PEM that is handed out
	Roots       [][]byte `cbor:"5,keyasint" json:"roots"`       // DER, in the order in which they are handed out
	CRLs        [][]byte `cbor:"6,keyasint,omitempty" json:"crls,omitempty"`
	Floor       uint64   `cbor:"7,keyasint" json:"floor"` // from this commit on nothing older is handed out; never falls
	Reason      string   `cbor:"8,keyasint,omitempty" json:"reason,omitempty"`
}

// Token records that a join token was made. The token itself is never stored.
type Token struct {
	ID       string `cbor:"1,keyasint" json:"id"` // the JWT's "jti"
	SPIFFEID string `cbor:"2,keyasint" json:"spiffe_id"`
	Expires  Time   `cbor:"3,keyasint" json:"expires"`
	Reusable bool   `cbor:"4,keyasint,omitempty" json:"reusable,omitempty"`
	By       string `cbor:"5,keyasint" json:"by"` // peer credentials of the admin who asked
}

// Revoke records that a certificate authenticates nobody any more. Appending it twice is ErrAlready.
type Revoke struct {
	Serial   Serial `cbor:"1,keyasint" json:"serial"`
	Number   uint64 `cbor:"2,keyasint,omitempty" json:"number,omitempty"` // of the Issue event, when this log has it
	NotAfter Time   `cbor:"3,keyasint" json:"not_after"`                  // after which the revocation need not be remembered
	Reason   string `cbor:"4,keyasint,omitempty" json:"reason,omitempty"`
	By       string `cbor:"5,keyasint" json:"by"`
}

// Waiver records that an admin vouched for what a gate could not know by itself.
type Waiver struct {
	Gate   string `cbor:"1,keyasint" json:"gate"`                     // clock: that the wall clock is right
	From   Time   `cbor:"2,keyasint,omitempty" json:"from,omitempty"` // of the clock: what was borne out before …
	To     Time   `cbor:"3,keyasint,omitempty" json:"to,omitempty"`   // … and what the admin bore out
	Reason string `cbor:"4,keyasint,omitempty" json:"reason,omitempty"`
	By     string `cbor:"5,keyasint" json:"by"` // peer credentials of the admin
}

// Restore begins a new log in a file that comes from a backup, or from a copy of a data folder. It is the first event of its commit; numbers and
// hash chain go on. What the old log recorded after Number, nobody knows here. So with it every authority that is neither removed nor foreign is
// covered only since this event, and the join tokens of before are void. The bundle that follows in the same commit leaps ahead of every one
// that the lost store may have handed out. The ledger fills in all but Taken, Mark and By.
type Restore struct {
	Log         LogID  `cbor:"1,keyasint" json:"old_log"`         // that ends; the event's own is the one that begins
	Incarnation Hash   `cbor:"2,keyasint" json:"old_incarnation"` // of the store that it was in
	Number      uint64 `cbor:"3,keyasint" json:"last_number"`     // of its last event that is known here
	Hash        Hash   `cbor:"4,keyasint" json:"last_hash"`       // chain hash after that
	Next        Hash   `cbor:"5,keyasint" json:"incarnation"`     // of the store from now on
	Taken       Time   `cbor:"6,keyasint" json:"taken"`           // when the backup was made; of a folder, the time of its last event
	Mark        *Mark  `cbor:"7,keyasint,omitempty" json:"high_water,omitempty"`
	By          string `cbor:"8,keyasint" json:"by"` // the admin
}

// Unknown is the body of an event whose type a later version wrote: kept, hashed and exported, never interpreted.
type Unknown struct {
	Of  Type   `json:"-"`
	Raw []byte `json:"raw"`
}

func (*Issue) Type() Type     { return TypeIssue }
func (*Confirm) Type() Type   { return TypeConfirm }
func (*Authority) Type() Type { return TypeAuthority }
func (*Bundle) Type() Type    { return TypeBundle }
func (*Token) Type() Type     { return TypeToken }
func (*Revoke) Type() Type    { return TypeRevoke }
func (*Waiver) Type() Type    { return TypeWaiver }
func (*Restore) Type() Type   { return TypeRestore }
func (u *Unknown) Type() Type { return u.Of }
