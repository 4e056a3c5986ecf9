package config

import (
	"fmt"
	"strings"
)

// Problem is one thing that is wrong with a configuration.
type Problem struct {
	Path string `json:"path"` // of the key, like "callers.tokenIssuers[0].issuer"; "": the file as a whole
	Text string `json:"text"` // what is wrong, and what to do
}

func (p Problem) String() string {
	if p.Path == "" {
		return p.Text
	}
	return p.Path + ": " + p.Text
}

// Error is everything that is wrong with a configuration, for people: one line, or one a problem.
type Error struct {
	File     string // "": the configuration did not come from a file
	Problems []Problem
}

func (e *Error) Error() string {
	from := e.File
	if from == "" {
		from = "the configuration"
	}
	if len(e.Problems) == 1 {
		return fmt.Sprintf("%s: %s", from, e.Problems[0])
	}
	lines := []string{fmt.Sprintf("%s: %d problems", from, len(e.Problems))}
	for _, p := range e.Problems {
		lines = append(lines, "  "+p.String())
	}
	return strings.Join(lines, "\n")
}

// problems gathers what is wrong.
type problems []Problem

func (p *problems) refuse(path, format string, args ...any) {
	*p = append(*p, Problem{path, fmt.Sprintf(format, args...)})
}
