package config

import (
	"bytes"
	"fmt"
	"io"
	"reflect"
	"strings"

	"go.yaml.in/yaml/v2"
)

// FromKeys makes a configuration of single keys, like "root.kind": "vault", each with its value as it would stand in a file. The error is an *Error.
func FromKeys(keys map[string]string, folder string) (*Config, error) {
	document := map[any]any{}
	for path, text := range keys {
		var value any
		if err := yaml.Unmarshal([]byte(text), &value); err != nil || value == nil {
			value = text
		}
		below, names := document, strings.Split(path, ".")
		for _, name := range names[:len(names)-1] {
			inner, ok := below[name].(map[any]any)
			if !ok {
				inner = map[any]any{}
				below[name] = inner
			}
			below = inner
		}
		below[names[len(names)-1]] = value
	}
	text, err := yaml.Marshal(document)
	if err != nil {
		return nil, fmt.Errorf("writing the keys as YAML: %w", err)
	}
	return parse(text, "the keys that were given", folder)
}

// commentWidth is the length of the lines of comments, in characters.
const commentWidth = 110

// WriteTemplate writes a configuration for people to go on with: what they decide on, each key with its comment and its value, and only the sections that count. What it
// leaves out has its default.
func (c *Config) WriteTemplate(w io.Writer) error {
	comments, _, err := Comments()
	if err != nil {
		return err
	}
	t := template{comments: comments, usual: reflect.ValueOf(*c.usual()), skip: map[string]bool{
		"csr": true, "operations": true, "log": true, "tracing": true, "profiles": true, "cfsslProfilesFile": true, "callers": true, "ledger": true,
		"root.foreignWindow": c.Root.Kind == RootKindFile, "issuingCA.passphraseFile": c.IssuingCA.KeyStore != KeyStoreFile, "vault": !c.UsesVault(), "pkcs11": !c.UsesPKCS11(),
	}}
	for _, kind := range RootKinds() {
		t.skip[at("root", kind)] = kind != c.Root.Kind
	}
	for _, kind := range KeyStores() {
		t.skip[at("issuingCA", kind)] = kind != c.IssuingCA.KeyStore
	}
	t.text.WriteString("# Kedge's configuration. What is not here has its default: 'kedge config print' shows all that holds, docs/configuration.md explains it.\n")
	if err := t.section("", 0, reflect.ValueOf(*c)); err != nil {
		return err
	}
	if _, err := w.Write(t.text.Bytes()); err != nil {
		return fmt.Errorf("writing the configuration: %w", err)
	}
	return nil
}

type template struct {
	text     bytes.Buffer
	comments map[string]string
	usual    reflect.Value
	skip     map[string]bool // sections and keys that are left out unless they differ from their default
}

func (t *template) section(path string, depth int, v reflect.Value) error {
	usual := t.usual
	for _, name := range strings.Split(path, ".") {
		for i := range usual.NumField() {
			if path != "" && usual.Type().Field(i).Tag.Get("yaml") == name {
				usual = usual.Field(i)
				break
			}
		}
	}
	indent := strings.Repeat("  ", depth)
	for i := range v.NumField() {
		field := v.Type().Field(i)
		key := field.Tag.Get("yaml")
		full := at(path, key)
		if t.skip[full] && reflect.DeepEqual(v.Field(i).Interface(), usual.Field(i).Interface()) {
			continue
		}
		t.comment(indent, t.comments[v.Type().Name()+"."+field.Name])
		if field.Type.Kind() == reflect.Struct {
			fmt.Fprintf(&t.text, "%s%s:\n", indent, key)
			if err := t.section(full, depth+1, v.Field(i)); err != nil {
				return err
			}
			continue
		}
		value, err := yaml.Marshal(map[string]any{key: v.Field(i).Interface()})
		if err != nil {
			return fmt.Errorf("writing %s: %w", full, err)
		}
		for line := range strings.Lines(string(value)) {
			t.text.WriteString(indent + line)
		}
	}
	return nil
}

// comment writes a comment in lines of a bounded length.
func (t *template) comment(indent, text string) {
	if indent == "" {
		t.text.WriteString("\n")
	}
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && len(indent)+len(line)+len(word) > commentWidth {
			fmt.Fprintf(&t.text, "%s# %s\n", indent, line)
			line = ""
		}
		line = strings.TrimPrefix(line+" "+word, " ")
	}
	fmt.Fprintf(&t.text, "%s# %s\n", indent, line)
}
