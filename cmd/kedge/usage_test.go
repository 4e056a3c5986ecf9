package main

import (
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// TestEveryVerbSaysWhichArgumentIsMissingOrTooMany, with its own usage.
func TestEveryVerbSaysWhichArgumentIsMissingOrTooMany(t *testing.T) {
	var verbs int
	var visit func(c *cobra.Command)
	visit = func(c *cobra.Command) {
		for _, sub := range c.Commands() {
			visit(sub)
		}
		if c.HasSubCommands() {
			return
		}
		verbs++
		if c.Args == nil {
			t.Errorf("%s takes whatever it is given", c.CommandPath())
			return
		}
		usage := ": write '" + c.CommandPath()
		if err := c.Args(c, []string{"one", "two", "three"}); err == nil || !strings.Contains(err.Error(), "is an argument too many"+usage) {
			t.Errorf("%s with three arguments: %v", c.CommandPath(), err)
		}
		if err := c.Args(c, nil); err != nil && !strings.Contains(err.Error(), "is missing"+usage) {
			t.Errorf("%s without arguments: %v", c.CommandPath(), err)
		}
	}
	visit(newRootCommand())
	if verbs < 15 {
		t.Errorf("there are only %d verbs: are they still found?", verbs)
	}
}
