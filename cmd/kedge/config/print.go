package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"

	"go.yaml.in/yaml/v2"
	jsonyaml "sigs.k8s.io/yaml"
)

// Print writes everything that holds, defaults filled in, as YAML or as JSON. Load reads both back to the same. It shows no secret,
// since a Config holds none, only the paths of the files that do.
func (c *Config) Print(w io.Writer, asJSON bool) error {
	text, err := yaml.Marshal(c)
	if err != nil {
		return fmt.Errorf("writing the configuration as YAML: %w", err)
	}
	if asJSON {
		if text, err = jsonyaml.YAMLToJSONStrict(text); err != nil {
			return fmt.Errorf("writing the configuration as JSON: %w", err)
		}
		var indented bytes.Buffer
		if err := json.Indent(&indented, append(text, '\n'), "", "  "); err != nil {
			return fmt.Errorf("writing the configuration as JSON: %w", err)
		}
		text = indented.Bytes()
	}
	if _, err := w.Write(text); err != nil {
		return fmt.Errorf("printing the configuration: %w", err)
	}
	return nil
}
