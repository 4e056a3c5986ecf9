package hsm

import (
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
)

// URI names a token, and perhaps a key on it, as RFC 7512 writes it. The zero value names nothing.
type URI struct {
	Token        string // label of the token
	Serial       string // serial number of the token
	Manufacturer string
	Model        string
	Object       string // CKA_LABEL of the key
	ID           []byte // CKA_ID of the key
	PINSource    PINSource
	ModulePath   string // absolute path of the module's shared library
}

// PINSource says where the PIN is read from. Exactly one of the two is set; the zero value is no source.
type PINSource struct {
	File     string // absolute path
	Variable string // of the environment
}

func (s PINSource) String() string {
	if s.Variable != "" {
		return "env:" + s.Variable
	}
	return "file:" + s.File
}

// ParseURI reads a PKCS#11 URI (RFC 7512). The token is chosen by label or serial number: slots move, so an attribute that names one is refused, as is
// pin-value, a secret in a text that is printed and kept. pin-source is "file:" with an absolute path, an absolute path, or "env:" with a name;
// module-path is absolute. An attribute that is unknown or given twice is an error.
func ParseURI(text string) (URI, error) {
	u, err := parseURI(text)
	if err != nil {
		return URI{}, fmt.Errorf("PKCS#11 URI: %w", err)
	}
	return u, nil
}

func parseURI(text string) (URI, error) {
	var u URI
	rest, ok := strings.CutPrefix(text, "pkcs11:")
	if !ok {
		return u, errors.New(`it does not begin with "pkcs11:"`)
	}
	path, query, _ := strings.Cut(rest, "?")
	seen := map[string]bool{}
	each := func(part, separator string, set func(name, value string) error) error {
		if part == "" {
			return nil
		}
		for pair := range strings.SplitSeq(part, separator) {
			name, raw, ok := strings.Cut(pair, "=")
			if name == "pin-value" {
				return errPINValue // before anything of it could get into an error
			}
			if !ok || name == "" {
				return fmt.Errorf(`an attribute is not of the form name=value, or %q stands where none belongs`, separator)
			}
			value, err := percentDecode(raw, separator)
			if err != nil {
				return fmt.Errorf("attribute %s: %w", name, err)
			}
			if seen[name] {
				return fmt.Errorf("attribute %s is given twice", name)
			}
			seen[name] = true
			if value == "" {
				return fmt.Errorf("attribute %s is empty: leave it out", name)
			}
			if err := set(name, value); err != nil {
				return err
			}
		}
		return nil
	}
	if err := each(path, ";", u.setPath); err != nil {
		return URI{}, err
	}
	if err := each(query, "&", u.setQuery); err != nil {
		return URI{}, err
	}
	return u, nil
}

var errPINValue = errors.New("pin-value is refused: a secret does not belong in a configuration. Write the PIN into a file and name it: pin-source=file:/path")

func (u *URI) setPath(name, value string) error {
	if name != "id" && strings.ContainsRune(value, 0) {
		return fmt.Errorf("attribute %s has a zero byte in it", name)
	}
	switch name {
	case "token":
		u.Token = value
	case "serial":
		u.Serial = value
	case "manufacturer":
		u.Manufacturer = value
	case "model":
		u.Model = value
	case "object":
		u.Object = value
	case "id":
		u.ID = []byte(value)
	case "type":
		if value != "private" {
			return fmt.Errorf("type is %q, and only private keys sign: write type=private or leave it out", value)
		}
	case "slot-id", "slot-description", "slot-manufacturer":
		return fmt.Errorf("%s is refused: slots move. Name the token by token= or serial=", name)
	case "pin-source", "module-path":
		return fmt.Errorf("%s belongs behind the question mark", name)
	default:
		return fmt.Errorf("unknown attribute %q: there are token, serial, manufacturer, model, object, id and type", name)
	}
	return nil
}

func (u *URI) setQuery(name, value string) error {
	if strings.ContainsRune(value, 0) {
		return fmt.Errorf("attribute %s has a zero byte in it", name)
	}
	switch name {
	case "pin-source":
		if variable, ok := strings.CutPrefix(value, "env:"); ok {
			if variable == "" || strings.ContainsRune(variable, '=') {
				return errors.New("pin-source=env: names no environment variable")
			}
			u.PINSource = PINSource{Variable: variable}
			return nil
		}
		path := strings.TrimPrefix(value, "file:")
		if after, ok := strings.CutPrefix(path, "//"); ok {
			path = after
		}
		if !filepath.IsAbs(path) {
			return errors.New("pin-source is none of file:/absolute/path, /absolute/path, env:NAME")
		}
		u.PINSource = PINSource{File: filepath.Clean(path)}
	case "module-path":
		if !filepath.IsAbs(value) {
			return fmt.Errorf("module-path is %q, not an absolute path", value)
		}
		u.ModulePath = filepath.Clean(value)
	case "module-name":
		return errors.New("module-name is refused: name the file, module-path=/path")
	default:
		return fmt.Errorf("unknown attribute %q: behind the question mark there are pin-source and module-path", name)
	}
	return nil
}

// What may stand in a value unencoded, beside letters and digits: pk11-pchar and pk11-qchar of RFC 7512, 2.3.
const (
	pathMarks  = "-._~:[]@!$'()*+,=&"
	queryMarks = "-._~:[]@!$'()*+,=/?|"
)

func percentDecode(raw, separator string) (string, error) {
	marks := pathMarks
	if separator == "&" {
		marks = queryMarks
	}
	var out strings.Builder
	for i := 0; i < len(raw); i++ {
		c := raw[i]
		switch {
		case c == '%':
			if i+2 >= len(raw) {
				return "", errors.New("a percent sign is not followed by two hexadecimal digits")
			}
			b, err := hex.DecodeString(raw[i+1 : i+3])
			if err != nil {
				return "", errors.New("a percent sign is not followed by two hexadecimal digits")
			}
			out.WriteByte(b[0])
			i += 2
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte(marks, c) >= 0:
			out.WriteByte(c)
		default:
			return "", fmt.Errorf("%q cannot stand there as it is: write %%%02X", c, c)
		}
	}
	return out.String(), nil
}

func percentEncode(value, marks string) string {
	var out strings.Builder
	for i := 0; i < len(value); i++ {
		c := value[i]
		if 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte(marks, c) >= 0 {
			out.WriteByte(c)
		} else {
			fmt.Fprintf(&out, "%%%02X", c)
		}
	}
	return out.String()
}

// String writes the URI. There is no PIN in it, only where one is read from.
func (u URI) String() string {
	var path, query []string
	for _, p := range []struct{ name, value string }{
		{"token", u.Token}, {"serial", u.Serial}, {"manufacturer", u.Manufacturer}, {"model", u.Model}, {"object", u.Object},
	} {
		if p.value != "" {
			path = append(path, p.name+"="+percentEncode(p.value, pathMarks))
		}
	}
	if len(u.ID) > 0 {
		path = append(path, "id="+percentEncode(string(u.ID), ""))
	}
	if u.ModulePath != "" {
		query = append(query, "module-path="+percentEncode(u.ModulePath, queryMarks))
	}
	if u.PINSource != (PINSource{}) {
		query = append(query, "pin-source="+percentEncode(u.PINSource.String(), queryMarks))
	}
	text := "pkcs11:" + strings.Join(path, ";")
	if len(query) > 0 {
		text += "?" + strings.Join(query, "&")
	}
	return text
}
