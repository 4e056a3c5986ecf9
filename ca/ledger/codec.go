package ledger

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"unicode/utf8"

	"github.com/fxamacker/cbor/v2"
)

// The stored form of an event is one CBOR array (RFC 8949, core deterministic encoding 4.2.1):
//
//	[version, type, time, log, number, body]
//
// body is a map with small integers as keys. A later version may add keys, which this one skips, and types, which it keeps
// as Unknown. These bytes are what is stored, hashed and archived.
const (
	envelopeVersion = 1
	envelopeFields  = 6
	// maxEvent bounds one event, in octets: room for a bundle with long CRLs.
	maxEvent = 4 << 20
	// maxElements bounds every list in an event.
	maxElements = 4096
	maxNesting  = 12
)

// The modes are constants in all but name.
var (
	encoding = must(cbor.CoreDetEncOptions().EncMode())
	decoding = must(cbor.DecOptions{
		DupMapKey:        cbor.DupMapKeyEnforcedAPF,
		IndefLength:      cbor.IndefLengthForbidden,
		TagsMd:           cbor.TagsForbidden,
		MaxNestedLevels:  maxNesting,
		MaxArrayElements: maxElements,
		MaxMapPairs:      maxElements,
	}.DecMode())
)

func must[T any](mode T, err error) T {
	if err != nil {
		panic(err) // the options above contradict each other
	}
	return mode
}

// envelope is an event without its body.
type envelope struct {
	version uint8
	typ     Type
	time    Time
	log     LogID
	number  uint64
}

// seal returns the stored form of an event: the envelope around an encoded body.
func (e envelope) seal(body []byte) []byte {
	raw := make([]byte, 0, len(body)+40)
	raw = appendHead(raw, majorArray, envelopeFields)
	raw = appendHead(raw, majorUint, uint64(e.version))
	raw = appendHead(raw, majorUint, uint64(e.typ))
	raw = appendHead(raw, majorUint, uint64(e.time))
	raw = appendHead(raw, majorBytes, uint64(len(e.log)))
	raw = append(raw, e.log[:]...)
	raw = appendHead(raw, majorUint, e.number)
	return append(raw, body...)
}

// unseal is the inverse of seal. It is cheap: the body is not looked at, and is a part of raw.
func unseal(raw []byte) (e envelope, body []byte, err error) {
	if len(raw) > maxEvent {
		return e, nil, fmt.Errorf("an event has at most %d octets, not %d", maxEvent, len(raw))
	}
	r := reader{rest: raw}
	fields := r.head(majorArray)
	version := r.head(majorUint)
	if r.err == nil && (version != envelopeVersion || fields != envelopeFields) {
		return e, nil, fmt.Errorf("the event's envelope has version %d and %d fields: this program reads version %d with %d",
			version, fields, envelopeVersion, envelopeFields)
	}
	typ, at := r.head(majorUint), r.head(majorUint)
	if size := r.head(majorBytes); r.err == nil && size != uint64(len(e.log)) {
		r.err = fmt.Errorf("the log's id has %d octets, not %d", size, len(e.log))
	}
	copy(e.log[:], r.take(len(e.log)))
	e.number = r.head(majorUint)
	if r.err == nil && (typ == 0 || typ > math.MaxUint8 || at > math.MaxInt64) {
		r.err = fmt.Errorf("type %d or time %d is out of range", typ, at)
	}
	if r.err != nil {
		return envelope{}, nil, fmt.Errorf("not the envelope of an event: %w", r.err)
	}
	e.version, e.typ, e.time = uint8(version), Type(typ), Time(at)
	return e, r.rest, nil
}

// The major types of CBOR (RFC 8949 3.1) that are written or read here by hand.
const (
	majorUint  = 0
	majorBytes = 2
	majorText  = 3
	majorArray = 4
)

// appendHead appends the head of a CBOR item in its shortest form.
func appendHead(b []byte, major byte, v uint64) []byte {
	major <<= 5
	switch {
	case v < 24:
		return append(b, major|byte(v))
	case v <= math.MaxUint8:
		return append(b, major|24, byte(v))
	case v <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(b, major|25), uint16(v))
	case v <= math.MaxUint32:
		return binary.BigEndian.AppendUint32(append(b, major|26), uint32(v))
	}
	return binary.BigEndian.AppendUint64(append(b, major|27), v)
}

// reader takes CBOR heads off the front of rest. After an error it gives zeros.
type reader struct {
	rest []byte
	err  error
}

func (r *reader) take(n int) []byte {
	if r.err == nil && len(r.rest) < n {
		r.err = errors.New("it ends too early")
	}
	if r.err != nil {
		return nil
	}
	taken := r.rest[:n]
	r.rest = r.rest[n:]
	return taken
}

// head reads the head of an item of the given major type, in its shortest form only.
func (r *reader) head(major byte) (v uint64) {
	first := r.take(1)
	if r.err != nil {
		return 0
	}
	if first[0]>>5 != major {
		r.err = fmt.Errorf("an item of CBOR type %d stands where type %d belongs", first[0]>>5, major)
		return 0
	}
	info := first[0] & 31
	var least uint64
	switch info {
	case 24:
		if b := r.take(1); r.err == nil {
			v, least = uint64(b[0]), 24
		}
	case 25:
		if b := r.take(2); r.err == nil {
			v, least = uint64(binary.BigEndian.Uint16(b)), math.MaxUint8+1
		}
	case 26:
		if b := r.take(4); r.err == nil {
			v, least = uint64(binary.BigEndian.Uint32(b)), math.MaxUint16+1
		}
	case 27:
		if b := r.take(8); r.err == nil {
			v, least = binary.BigEndian.Uint64(b), math.MaxUint32+1
		}
	default:
		if info > 27 {
			r.err = errors.New("a number of indefinite or reserved length")
		}
		return uint64(info)
	}
	if r.err == nil && v < least {
		r.err = errors.New("a number is not in its shortest form")
	}
	return v
}

// encodeBody checks what a caller wants recorded, and encodes it.
func encodeBody(body Body) ([]byte, error) {
	if err := checkBody(body); err != nil {
		return nil, err
	}
	encoded, err := encoding.Marshal(body)
	if err != nil {
		return nil, fmt.Errorf("encoding the %s event: %w", body.Type(), err)
	}
	if len(encoded) > maxEvent-64 {
		return nil, fmt.Errorf("the %s event has %d octets, more than the %d that the ledger keeps", body.Type(), len(encoded), maxEvent-64)
	}
	return encoded, nil
}

// DecodeEvent reads the stored form of an event. It is strict, and bounded: raw has at most 4 MiB, and no list in it more than
// 4096 entries. The event shares no memory with raw.
func DecodeEvent(raw []byte) (Event, error) {
	e, encoded, err := unseal(raw)
	if err != nil {
		return Event{}, err
	}
	body, err := decodeBody(e.typ, encoded)
	if err != nil {
		return Event{}, fmt.Errorf("body of the %s event %d: %w", e.typ, e.number, err)
	}
	return Event{Version: e.version, Type: e.typ, Time: e.time, Log: e.log, Number: e.number, Body: body}, nil
}

func decodeBody(typ Type, encoded []byte) (Body, error) {
	if len(encoded) == 0 || encoded[0]>>5 != 5 {
		return nil, errors.New("it is not a CBOR map")
	}
	var body Body
	switch typ {
	case TypeIssue:
		body = new(Issue)
	case TypeConfirm:
		body = new(Confirm)
	case TypeAuthority:
		body = new(Authority)
	case TypeBundle:
		body = new(Bundle)
	case TypeToken:
		body = new(Token)
	case TypeRevoke:
		body = new(Revoke)
	case TypeWaiver:
		body = new(Waiver)
	case TypeRestore:
		body = new(Restore)
	default:
		if err := decoding.Wellformed(encoded); err != nil {
			return nil, err
		}
		return &Unknown{Of: typ, Raw: bytes.Clone(encoded)}, nil
	}
	if err := decoding.Unmarshal(encoded, body); err != nil {
		return nil, err
	}
	return body, nil
}

// UnmarshalCBOR takes exactly 32 octets, where the codec by itself would pad and cut.
func (h *Hash) UnmarshalCBOR(item []byte) error {
	const head = "\x58\x20" // a byte string of 32 octets
	if len(item) != len(head)+len(h) || string(item[:len(head)]) != head {
		return fmt.Errorf("a SHA-256 digest is a byte string of %d octets", len(h))
	}
	copy(h[:], item[len(head):])
	return nil
}

// UnmarshalCBOR takes exactly 16 octets.
func (l *LogID) UnmarshalCBOR(item []byte) error {
	const head = "\x50" // a byte string of 16 octets
	if len(item) != len(head)+len(l) || string(item[:len(head)]) != head {
		return fmt.Errorf("a log's id is a byte string of %d octets", len(l))
	}
	copy(l[:], item[len(head):])
	return nil
}

// checkBody refuses what could be encoded and then not be read back, or what no such event can say.
func checkBody(body Body) error {
	var err error
	switch b := body.(type) {
	case *Issue:
		err = b.check()
	case *Confirm:
		err = errors.Join(b.Serial.check(), checkText(b.How))
		if b.Number == 0 {
			err = errors.New("it names no issue event")
		}
	case *Authority:
		err = b.check()
	case *Bundle:
		err = errors.Join(checkText(b.TrustDomain, b.Reason), checkList(len(b.Roots)), checkList(len(b.CRLs)))
		if len(b.Roots) == 0 {
			err = errors.New("it has no root")
		}
	case *Token:
		err = checkText(b.ID, b.SPIFFEID, b.By)
		if b.ID == "" || b.SPIFFEID == "" || len(b.ID) > 1024 {
			err = errors.New("a join token has an id (up to 1024 octets) and a SPIFFE ID")
		}
	case *Revoke:
		err = errors.Join(b.Serial.check(), checkText(b.Reason, b.By))
	case *Waiver:
		err = checkText(b.Gate, b.Reason, b.By)
		if b.Gate == "" {
			err = errors.New("it names no gate")
		}
	case *Restore:
		err = checkText(b.By)
		if b.Number == 0 {
			err = errors.New("it names no event that is known")
		}
	case nil:
		return errors.New("there is no event to append")
	default:
		return fmt.Errorf("this version does not append %s events", body.Type())
	}
	if err != nil {
		return fmt.Errorf("the %s event is not valid: %w", body.Type(), err)
	}
	return nil
}

func (i *Issue) check() error {
	texts := append([]string{i.SPIFFEID, i.Profile, i.Holder.Kind, i.Holder.ID, i.Token, i.RequestID, i.Peer, i.ClusterID}, i.Names...)
	for _, proof := range i.Proofs {
		texts = append(texts, proof.Method, proof.Issuer, proof.Subject)
	}
	if i.FirstProof != nil {
		texts = append(texts, i.FirstProof.Method, i.FirstProof.Issuer, i.FirstProof.Subject)
	}
	switch {
	case i.NotAfter < i.NotBefore || i.NotAfter <= 0:
		return fmt.Errorf("its validity ends at %s and begins at %s", i.NotAfter, i.NotBefore)
	case deliveryNames[i.Delivery] == "":
		return fmt.Errorf("it has the unknown way of delivery %d", i.Delivery)
	case i.Token != "" && i.SPIFFEID == "":
		return errors.New("it spends a join token without a SPIFFE ID")
	}
	return errors.Join(i.Serial.check(), checkList(len(i.Names)), checkList(len(i.Proofs)), checkText(texts...))
}

func (a *Authority) check() error {
	if (a.From == 0) != (a.Record != nil) {
		return errors.New("an authority that enters (from = none) comes with its record, and no other does")
	}
	err := checkText(a.TrustDomain, a.Reason, a.By)
	if r := a.Record; r != nil {
		if sha256.Sum256(r.Certificate) != a.ID {
			return errors.New("its id is not the SHA-256 of its certificate")
		}
		err = errors.Join(err, checkText(r.Kind, r.KeyRef, r.Coverage.Kind), checkList(len(r.Chain)))
	}
	return err
}

func checkText(texts ...string) error {
	for _, text := range texts {
		if !utf8.ValidString(text) {
			return fmt.Errorf("the text %.60q is not UTF-8", text)
		}
	}
	return nil
}

func checkList(length int) error {
	if length > maxElements {
		return fmt.Errorf("it has a list of %d, more than %d", length, maxElements)
	}
	return nil
}

// ChainHash names the certificates handed out with a leaf: SHA-256 over the DERs, each after its length in four octets, big-endian.
func ChainHash(chain [][]byte) Hash {
	sum := sha256.New()
	for _, der := range chain {
		sum.Write(binary.BigEndian.AppendUint32(nil, uint32(len(der))))
		sum.Write(der)
	}
	return Hash(sum.Sum(nil))
}

// commitHash links a commit to the one before it: SHA-256 over the hash before, the number of events, and each event
// after its length (both in eight octets, big-endian).
func commitHash(previous Hash, raws [][]byte) Hash {
	sum := sha256.New()
	sum.Write(previous[:])
	sum.Write(binary.BigEndian.AppendUint64(nil, uint64(len(raws))))
	for _, raw := range raws {
		sum.Write(binary.BigEndian.AppendUint64(nil, uint64(len(raw))))
		sum.Write(raw)
	}
	return Hash(sum.Sum(nil))
}

// genesisHash stands before the first commit of a log: SHA-256 over a label, the incarnation and the log's id.
func genesisHash(incarnation Hash, log LogID) Hash {
	return sha256.Sum256(append(append([]byte("kedge ledger 1\x00"), incarnation[:]...), log[:]...))
}
