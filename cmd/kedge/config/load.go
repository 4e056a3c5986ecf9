package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"go.yaml.in/yaml/v2"

	"kedge/ca"
)

// maxFile is the largest file that is read, in octets, and the most text that one may hold after its aliases were followed.
const maxFile = 1 << 20

// Load reads the file at path. What the file leaves out has its default. The error is an *Error, with everything that is wrong with the
// file's form, when the file could be read; call Validate for whether the values make sense.
func Load(path string) (*Config, error) {
	text, folder, err := read(path)
	if err != nil {
		return nil, err
	}
	return parse(text, path, folder)
}

// read reads a file, and finds the folder at which its relative paths begin.
func read(path string) (text []byte, folder string, err error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, "", fmt.Errorf("opening the configuration: %w", err)
	}
	defer file.Close() // it was only read
	text, err = io.ReadAll(io.LimitReader(file, maxFile+1))
	if err != nil {
		return nil, "", fmt.Errorf("reading the configuration %s: %w", path, err)
	}
	folder, err = filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, "", fmt.Errorf("finding the folder of the configuration %s: %w", path, err)
	}
	return text, folder, nil
}

// parse reads the text of a file whose relative paths begin at folder.
func parse(text []byte, name, folder string) (*Config, error) {
	c := Default()
	r, err := decode(text, name, c)
	if err != nil {
		return nil, err
	}
	r.settle(c)
	resolvePaths(reflect.ValueOf(c).Elem(), "", folder)
	c.fillRootDir()
	return c, nil
}

// decode puts the text of a file into what into points at, which holds the defaults.
func decode(text []byte, name string, into any) (*reader, error) {
	root := reflect.ValueOf(into).Elem()
	r := &reader{given: map[string]bool{}, root: root.Type()}
	if document, ok := r.document(text); ok {
		r.value("", document, root)
	}
	if len(r.problems) > 0 {
		return nil, &Error{File: name, Problems: r.problems}
	}
	return r, nil
}

// document decodes the one YAML document of a file. False: there is none, or it cannot be read.
func (r *reader) document(text []byte) (node any, ok bool) {
	if len(text) > maxFile {
		r.refuse("", "the file has more than the %d octets that are read", maxFile)
		return nil, false
	}
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	decoder.SetStrict(true)
	err := decoder.Decode(&node)
	var mistakes *yaml.TypeError
	switch {
	case errors.Is(err, io.EOF):
		return nil, false
	case errors.As(err, &mistakes): // keys that are there twice; the rest was decoded
		for _, mistake := range mistakes.Errors {
			r.refuse("", "%s", mistake)
		}
	case err != nil:
		r.refuse("", "it cannot be read as YAML: %v", err)
		return nil, false
	}
	var next any
	if err := decoder.Decode(&next); !errors.Is(err, io.EOF) {
		r.refuse("", `there is a second document (after "---"), and nothing of it would be used: write one document`)
	}
	return node, node != nil
}

// settle gives values to keys that were left out and follow from others.
func (r *reader) settle(c *Config) {
	if !r.given["root.file.dir"] {
		c.Root.File.Dir = "" // it follows dataDir
	}
	for name, p := range c.Profiles {
		if !r.given[at(at("profiles", name), "defaultTTL")] {
			p.DefaultTTL = min(p.DefaultTTL, p.MaxTTL)
			c.Profiles[name] = p
		}
	}
	if c.CFSSLProfilesFile != "" && !r.given[at("profiles", ca.DefaultProfile)] {
		delete(c.Profiles, ca.DefaultProfile) // it may come from there
	}
	for i := range c.Callers.TokenIssuers {
		issuer := &c.Callers.TokenIssuers[i]
		if issuer.Kind != KindKubernetes && !r.given[fmt.Sprintf("callers.tokenIssuers[%d].audiences", i)] {
			issuer.Audiences = nil
		}
	}
}

// resolvePaths makes the relative paths in v begin at folder.
func resolvePaths(v reflect.Value, kind, folder string) {
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			resolvePaths(v.Field(i), v.Type().Field(i).Tag.Get("kind"), folder)
		}
	case reflect.Slice:
		for i := range v.Len() {
			resolvePaths(v.Index(i), kind, folder)
		}
	case reflect.String:
		path := v.String()
		file := kind == "path" || kind == "secret" && !strings.HasPrefix(path, "env:")
		if file && path != "" && !filepath.IsAbs(path) {
			v.SetString(filepath.Join(folder, path))
		}
	}
}
