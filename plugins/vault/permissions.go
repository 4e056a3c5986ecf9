package vault

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// checkPermissions asks Vault whether Kedge's token may do what is needed: the methods by the paths. Nothing is done on them.
func (c *Client) checkPermissions(ctx context.Context, needed map[string]string) error {
	const route = "sys/capabilities-self"
	paths := slices.Sorted(maps.Keys(needed))
	var answer struct {
		Data map[string]json.RawMessage `json:"data"`
	}
	if err := c.write(ctx, c.o.Timeout, route, map[string]any{"paths": paths}, &answer); err != nil {
		return err
	}
	var missing []error
	for _, path := range paths {
		var has []string
		if err := json.Unmarshal(answer.Data[path], &has); err != nil {
			return fmt.Errorf("the answer of %s of the Vault %s is not what was expected: %w", route, c.o.Address, err)
		}
		if want := capabilities[needed[path]]; !slices.Contains(has, want) && !slices.Contains(has, "root") && !(want == "update" && slices.Contains(has, "create")) {
			missing = append(missing, fmt.Errorf("the policies of Kedge's token at the Vault %s lack %q on %q%s: write the policy of docs/vault.md", c.o.Address, want, path, c.o.inNamespace()))
		}
	}
	return errors.Join(missing...)
}
