package ledger

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
)

func samples(t testing.TB) []Body {
	h := newHouse(t)
	issue := h.issue(func(i *Issue) {
		i.Names, i.FirstProof, i.Replaces, i.Token = []string{"localhost"}, &Proof{Method: "oidc", Time: 1}, 7, "t"
		i.Delivery, i.Supersedes, i.Held = DeliverySDS, 6, 1
	})
	crl := bundle(2, 1)
	crl.CRLs, crl.Reason = [][]byte{{1, 2}}, "test"
	return []Body{
		issue, &Confirm{Number: 4, Serial: issue.Serial, How: "sds-ack", Retires: 2, Bundle: 7}, h.ca, move(h.ca.ID, StateActive, StateRetired), crl,
		&Token{ID: "t", SPIFFEID: "spiffe://cluster.local/x", Expires: 77, Reusable: true, By: "uid=0"},
		&Revoke{Serial: issue.Serial, Number: 4, NotAfter: 99, Reason: "lost", By: "uid=0"},
		&Waiver{Gate: "clock", From: 1, To: 2, Reason: "test", By: "uid=0"},
		&Restore{Log: LogID{1}, Incarnation: Hash{2}, Number: 7, Hash: Hash{3}, Next: Hash{4}, Taken: 5, Mark: &Mark{Log: LogID{6}, Number: 9, Hash: Hash{7}, Time: 8}, By: "uid=0"},
	}
}

func sealed(t testing.TB, body Body) []byte {
	encoded, err := encodeBody(body)
	if err != nil {
		t.Fatal(err)
	}
	return envelope{version: 1, typ: body.Type(), time: 1788264000, log: LogID{1, 2, 3}, number: 1 << 20}.seal(encoded)
}

func TestEveryEventReadsBackEqual(t *testing.T) {
	for _, body := range samples(t) {
		raw := sealed(t, body)
		e, err := DecodeEvent(raw)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(e.Body, body) || e.Type != body.Type() || e.Number != 1<<20 || e.Time != 1788264000 || e.Log != (LogID{1, 2, 3}) {
			t.Errorf("%s: %+v\nwant %+v", body.Type(), e, body)
		}
		if _, err := json.Marshal(e); err != nil {
			t.Error(err)
		}
	}
}

func TestALaterVersionsFieldsAreSkippedAndItsTypesKept(t *testing.T) {
	later := map[int]any{1: "t", 2: "spiffe://cluster.local/x", 3: 77, 5: "uid=0", 99: map[int]any{1: []string{"new"}}}
	encoded, err := encoding.Marshal(later)
	if err != nil {
		t.Fatal(err)
	}
	e, err := DecodeEvent(envelope{version: 1, typ: TypeToken, number: 1}.seal(encoded))
	if err != nil || e.Body.(*Token).Expires != 77 {
		t.Errorf("a token event with a new field: %+v, %v", e, err)
	}
	e, err = DecodeEvent(envelope{version: 1, typ: 200, number: 1}.seal(encoded))
	if err != nil || e.Type.String() != "type-200" || !bytes.Equal(e.Body.(*Unknown).Raw, encoded) {
		t.Errorf("an event of a new type: %+v, %v", e, err)
	}
}

func TestWhatIsNotAnEventIsRefused(t *testing.T) {
	good := sealed(t, samples(t)[1])
	body := func(b ...byte) []byte { return envelope{version: 1, typ: TypeConfirm, number: 1}.seal(b) }
	tests := map[string][]byte{
		"nothing":               nil,
		"cut short":             good[:len(good)-1],
		"followed by more":      append(bytes.Clone(good), 0),
		"a later envelope":      append([]byte{0x86, 2}, good[2:]...),
		"a longer envelope":     append([]byte{0x87}, good[1:]...),
		"a map":                 append([]byte{0xa3}, good[1:]...),
		"a long form":           append([]byte{0x86, 0x18, 1}, good[2:]...),
		"type 0":                append([]byte{0x86, 1, 0}, good[3:]...),
		"type 256":              append([]byte{0x86, 1, 0x19, 1, 0}, good[3:]...),
		"an array as body":      body(0x80),
		"a key twice":           body(0xa2, 1, 1, 1, 2),
		"indefinite length":     body(0xbf, 1, 1, 0xff),
		"a tag":                 body(0xa1, 1, 0xc2, 0x41, 1),
		"a text as number":      body(0xa1, 1, 0x61, 'x'),
		"invalid UTF-8":         body(0xa1, 3, 0x61, 0xff),
		"nested too deep":       body(append([]byte{0xa1, 0x18, 99}, bytes.Repeat([]byte{0x81}, 40)...)...),
		"an array of 2^32":      body(0xa1, 0x18, 99, 0x9a, 0xff, 0xff, 0xff, 0xff),
		"a string of 2^63":      body(0xa1, 3, 0x7b, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff),
		"a log of three bytes":  envelope{version: 1, typ: TypeRestore, number: 1}.seal([]byte{0xa1, 1, 0x43, 1, 2, 3}),
		"a hash of three bytes": envelope{version: 1, typ: TypeIssue, number: 1}.seal([]byte{0xa1, 2, 0x43, 1, 2, 3}),
		"too large":             make([]byte, maxEvent+1),
	}
	for name, raw := range tests {
		t.Run(name, func(t *testing.T) {
			if e, err := DecodeEvent(raw); err == nil {
				t.Errorf("it is read as %+v", e)
			}
		})
	}
}

func TestSerialsAreReadInTheFormsPeoplePaste(t *testing.T) {
	tests := []struct{ text, want string }{
		{"01ab", "01ab"}, {"1AB", "01ab"}, {"0x01ab", "01ab"}, {"01:AB", "01ab"}, {"00:00:01:ab", "01ab"}, {"7", "07"},
		{"", ""}, {"0", ""}, {"00:00", ""}, {"xyz", ""}, {"1:2", ""}, {"01:", ""}, {"-1", ""}, {strings.Repeat("ff", 65), ""}, {strings.Repeat("0", 1<<20), ""},
	}
	for _, test := range tests {
		serial, err := ParseSerial(test.text)
		if serial.String() != test.want || (err == nil) != (test.want != "") {
			t.Errorf("ParseSerial(%.20q) = %s, %v; want %q", test.text, serial, err, test.want)
		}
	}
}

func TestAChainHashDependsOnWhereCertificatesEnd(t *testing.T) {
	if ChainHash([][]byte{{1, 2}, {3}}) == ChainHash([][]byte{{1}, {2, 3}}) {
		t.Error("two chains have one hash")
	}
}

func FuzzDecodeEvent(f *testing.F) {
	for _, body := range samples(f) {
		f.Add(sealed(f, body))
	}
	f.Add(envelope{version: 1, typ: 200, number: 1}.seal([]byte{0xa0}))
	f.Fuzz(func(t *testing.T, raw []byte) {
		e, err := DecodeEvent(raw)
		if err != nil {
			return
		}
		if e.Body.Type() != e.Type {
			t.Errorf("event of type %s with a body of type %s", e.Type, e.Body.Type())
		}
		if _, err := json.Marshal(e.Body); err != nil {
			t.Errorf("an event that was read cannot be shown: %v", err)
		}
		if checkBody(e.Body) != nil {
			return
		}
		encoded, err := encodeBody(e.Body)
		if err != nil {
			t.Fatal(err)
		}
		again, err := DecodeEvent(envelope{e.Version, e.Type, e.Time, e.Log, e.Number}.seal(encoded))
		if err != nil {
			t.Fatalf("what is encoded cannot be read: %v", err)
		}
		if twice, err := encodeBody(again.Body); err != nil || !bytes.Equal(twice, encoded) {
			t.Errorf("encoding is not stable: %v", err)
		}
	})
}

func FuzzParseSerial(f *testing.F) {
	for _, text := range []string{"01ab", "0x1", "01:ab", "", "zz", "0:", "::", "00"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		serial, err := ParseSerial(text)
		if err != nil {
			if serial != nil {
				t.Error("an error comes with a serial")
			}
			return
		}
		if err := serial.check(); err != nil {
			t.Error(err)
		}
		if again, err := ParseSerial(serial.String()); err != nil || !bytes.Equal(again, serial) {
			t.Errorf("%s reads back as %s, %v", serial, again, err)
		}
	})
}
