package cfsslprofile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"
)

const (
	maxFile  = 1 << 20 // octets
	maxDepth = 16      // a profile's usages stand at depth 5
)

// object is a JSON object in the order of the file.
type object []member

type member struct {
	key   string
	value any // object, []any, string, json.Number, bool, nil
}

func (o object) has(key string) bool {
	for _, m := range o {
		if m.key == key {
			return true
		}
	}
	return false
}

func readBounded(r io.Reader) ([]byte, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err != nil {
		return nil, err
	}
	return text, nil
}

// decode reads exactly one JSON value, in which no object has a key twice.
func decode(text []byte) (any, error) {
	if len(text) > maxFile {
		return nil, fmt.Errorf("it has more than the %d octets that are read", maxFile)
	}
	if !utf8.Valid(text) {
		return nil, errors.New("it is not UTF-8")
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	value, err := decodeValue(decoder, "", 0)
	if err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, fmt.Errorf("the JSON ends at octet %d, before it is complete", decoder.InputOffset())
		}
		return nil, err
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("the JSON is followed by something at octet %d: a file holds one object", decoder.InputOffset())
	}
	return value, nil
}

func decodeValue(decoder *json.Decoder, path string, depth int) (any, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("%.100s: nested deeper than %d levels", path, maxDepth)
	}
	token, err := decoder.Token()
	if err != nil {
		return nil, syntax(decoder, err)
	}
	switch token {
	case json.Delim('{'):
		o := object{}
		seen := map[string]bool{}
		for decoder.More() {
			name, err := decoder.Token()
			if err != nil {
				return nil, syntax(decoder, err)
			}
			key, ok := name.(string)
			if !ok {
				return nil, fmt.Errorf("at octet %d stands no key", decoder.InputOffset())
			}
			at := join(path, key)
			if seen[key] {
				return nil, fmt.Errorf("%s: the key is there twice", at)
			}
			seen[key] = true
			value, err := decodeValue(decoder, at, depth+1)
			if err != nil {
				return nil, err
			}
			o = append(o, member{key, value})
		}
		_, err := decoder.Token()
		return o, syntax(decoder, err)
	case json.Delim('['):
		list := []any{}
		for decoder.More() {
			value, err := decodeValue(decoder, fmt.Sprintf("%s[%d]", path, len(list)), depth+1)
			if err != nil {
				return nil, err
			}
			list = append(list, value)
		}
		_, err := decoder.Token()
		return list, syntax(decoder, err)
	}
	return token, nil
}

// syntax adds where the JSON is broken. That it ended is said by decode.
func syntax(decoder *json.Decoder, err error) error {
	if err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return err
	}
	return fmt.Errorf("not JSON at octet %d: %w", decoder.InputOffset(), err)
}

func join(path, key string) string {
	if path == "" {
		return fmt.Sprintf("%.64s", key)
	}
	return fmt.Sprintf("%s.%.64s", path, key)
}

// kind names a JSON value for people.
func kind(node any) string {
	switch v := node.(type) {
	case object:
		return "an object"
	case []any:
		return "a list"
	case string:
		return fmt.Sprintf("the text %.40q", v)
	case json.Number:
		return fmt.Sprintf("the number %.40s", v)
	case bool:
		return fmt.Sprint(v)
	}
	return "null"
}
