// Command gendocs writes docs/configuration.md and docs/agent-configuration.md from the comments and tags of package config, so that the pages cannot differ from the code:
//
//	go run ./cmd/kedge/config/gendocs
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"

	"kedge/cmd/kedge/config"
)

// pages are what is written, each with what makes it.
var pages = map[string]func() ([]byte, error){"docs/configuration.md": generate, "docs/agent-configuration.md": generateAgent}

func main() {
	root, err := moduleRoot()
	for page, generate := range pages {
		var text []byte
		if err == nil {
			text, err = generate()
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(root, page), text, 0o644)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gendocs:", err)
		os.Exit(1)
	}
}

// moduleRoot is the nearest folder above the working folder that has a go.mod.
func moduleRoot() (string, error) {
	folder, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("finding the working folder: %w", err)
	}
	for {
		if _, err := os.Stat(filepath.Join(folder, "go.mod")); err == nil {
			return folder, nil
		}
		above := filepath.Dir(folder)
		if above == folder {
			return "", errors.New("there is no go.mod here or above: run it inside the checkout")
		}
		folder = above
	}
}

// generate makes the page of the CA's configuration.
func generate() ([]byte, error) {
	comments, intro, err := config.Comments()
	if err != nil {
		return nil, err
	}
	g := generator{comments: comments}
	g.write("# Configuration\n\n<!-- Generated from the comments in cmd/kedge/config/config.go by: go run ./cmd/kedge/config/gendocs -->\n\n%s\n", escape(intro))
	g.write("## What holds without a file\n\n```yaml\n")
	if err := config.Default().Print(&g.text, false); err != nil {
		return nil, err
	}
	g.write("```\n\n## The keys at the top\n\n")
	if err := g.section("", reflect.ValueOf(*config.Default())); err != nil {
		return nil, err
	}
	return append(bytes.TrimRight(g.text.Bytes(), "\n"), '\n'), nil
}

// generateAgent makes the page of the agent's configuration.
func generateAgent() ([]byte, error) {
	comments, _, err := config.Comments()
	if err != nil {
		return nil, err
	}
	g := generator{comments: comments}
	g.write("# Configuration of `kedge agent`\n\n<!-- Generated from the comments in cmd/kedge/config/agent.go by: go run ./cmd/kedge/config/gendocs -->\n\n")
	g.write("The file that `kedge agent --config FILE` reads: YAML, and as strict as the CA's ([configuration.md](configuration.md)). Relative paths begin at the folder of the file. ")
	g.write("What it is for, with examples: [agent.md](agent.md).\n\n## The keys at the top\n\n")
	if err := g.section("", reflect.ValueOf(*config.DefaultAgent())); err != nil {
		return nil, err
	}
	return append(bytes.TrimRight(g.text.Bytes(), "\n"), '\n'), nil
}

type generator struct {
	text     bytes.Buffer
	comments map[string]string
}

func (g *generator) write(format string, args ...any) { fmt.Fprintf(&g.text, format, args...) }

// section writes the keys of a struct, whose values are the defaults, and then the sections within it.
func (g *generator) section(path string, v reflect.Value) error {
	var within []func() error
	for i := range v.NumField() {
		field, value := v.Type().Field(i), v.Field(i)
		comment := g.comments[v.Type().Name()+"."+field.Name]
		if comment == "" {
			return fmt.Errorf("%s.%s has no comment", v.Type().Name(), field.Name)
		}
		key := field.Tag.Get("yaml")
		if path != "" {
			key = path + "." + key
		}
		below, inner := contents(key, value)
		if below == "" {
			if err := g.key(key, field, value, comment); err != nil {
				return err
			}
			continue
		}
		within = append(within, func() error {
			g.write("## `%s`\n\n%s\n\n", below, escape(comment))
			return g.section(below, inner)
		})
	}
	for _, write := range within {
		if err := write(); err != nil {
			return err
		}
	}
	return nil
}

// contents gives the path and the defaults of what is inside a section, or of each that is in a map or list of sections. "": it is none.
func contents(path string, v reflect.Value) (string, reflect.Value) {
	switch v.Interface().(type) {
	case map[string]config.Profile:
		return path + ".<name>", reflect.ValueOf(config.Default().Profiles["default"])
	case []config.TokenIssuer:
		return path + "[]", reflect.ValueOf(config.DefaultTokenIssuer())
	case []config.AgentWorkload:
		return path + "[]", reflect.ValueOf(config.DefaultAgentWorkload())
	case []config.AgentSocket:
		return path + "[]", reflect.ValueOf(config.DefaultAgentSocket())
	}
	if v.Kind() == reflect.Struct {
		return path, v
	}
	return "", reflect.Value{}
}

func (g *generator) key(path string, field reflect.StructField, value reflect.Value, comment string) error {
	what, err := typeName(field)
	if err != nil {
		return err
	}
	if rest, required := strings.CutPrefix(comment, "Required. "); required {
		g.write("### `%s`\n\n%s. Required.\n\n%s\n\n", path, what, escape(rest))
		return nil
	}
	fallback, err := defaultText(value)
	if err != nil {
		return fmt.Errorf("the default of %s: %w", path, err)
	}
	g.write("### `%s`\n\n%s. Default: `%s`.\n\n%s\n\n", path, what, fallback, escape(comment))
	return nil
}

func typeName(field reflect.StructField) (string, error) {
	name := "Text"
	switch field.Tag.Get("kind") {
	case "path":
		name = "Path"
	case "secret":
		name = "Path of a secret, or `env:` and the name of a variable"
	}
	switch {
	case field.Type == reflect.TypeFor[config.Duration]():
		return "Duration", nil
	case field.Type.Kind() == reflect.String:
		return name, nil
	case field.Type == reflect.TypeFor[[]string]():
		return "List of " + strings.ToLower(name) + "s", nil
	case field.Type.Kind() == reflect.Bool:
		return "true or false", nil
	case field.Type.Kind() == reflect.Float64:
		return "Number", nil
	case field.Type.Kind() == reflect.Int:
		return "Whole number", nil
	}
	return "", fmt.Errorf("%s has the type %s, for which the page has no word", field.Name, field.Type)
}

// defaultText is the default as it can stand in a file.
func defaultText(v reflect.Value) (string, error) {
	if d, ok := v.Interface().(config.Duration); ok {
		return d.String(), nil
	}
	if v.Kind() == reflect.Slice && v.Len() == 0 {
		return "[]", nil
	}
	var text bytes.Buffer
	encoder := json.NewEncoder(&text) // JSON is YAML
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v.Interface()); err != nil {
		return "", err
	}
	return strings.TrimSpace(text.String()), nil
}

// escape keeps Markdown from taking a pattern for emphasis or a tag.
func escape(text string) string {
	return strings.NewReplacer(`*`, `\*`, `_`, `\_`, `<`, `&lt;`).Replace(text)
}
