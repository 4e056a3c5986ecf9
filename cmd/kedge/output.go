package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
)

// printJSON writes one indented JSON document.
func printJSON(w io.Writer, v any) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(v)
}

// table is columns for people. Nothing is printed before flush.
type table struct {
	*tabwriter.Writer
}

func newTable(w io.Writer, headings ...string) table {
	t := table{tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)}
	if len(headings) > 0 {
		t.row(headings...)
	}
	return t
}

// row adds a row of one line, whatever is in its cells: some of it came from callers, and is not to move a terminal's cursor.
func (t table) row(cells ...string) {
	line := make([]string, len(cells))
	for i, cell := range cells {
		line[i] = strings.Map(func(r rune) rune {
			if !unicode.IsPrint(r) {
				return '\uFFFD'
			}
			return r
		}, cell)
	}
	fmt.Fprintln(t.Writer, strings.Join(line, "\t"))
}

// people writes an instant for people, and how far away it is.
func people(t time.Time) string {
	away := time.Until(t).Round(time.Second)
	switch {
	case away == 0:
		return fmt.Sprintf("%s (now)", t.UTC().Format(time.RFC3339))
	case away < 0:
		return fmt.Sprintf("%s (%s ago)", t.UTC().Format(time.RFC3339), about(-away))
	}
	return fmt.Sprintf("%s (in %s)", t.UTC().Format(time.RFC3339), about(away))
}

// about writes a duration with its two largest units.
func about(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d >= day:
		return fmt.Sprintf("%dd%dh", d/day, d%day/time.Hour)
	case d >= time.Hour:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	case d >= time.Minute:
		return fmt.Sprintf("%dm%ds", d/time.Minute, d%time.Minute/time.Second)
	}
	return fmt.Sprintf("%ds", d/time.Second)
}

// short is the beginning of an id, enough to tell it from others.
func short(id fmt.Stringer) string {
	text := id.String()
	return text[:min(len(text), 16)]
}
