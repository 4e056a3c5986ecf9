package config

import (
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	maxNodes    = 20_000 // values that a file may hold after its aliases were followed
	maxName     = 64     // octets of a name that stands as a key
	maxProblems = 50     // that are told at once
)

// reader puts decoded YAML into a Config or an Agent, strictly, and gathers what is wrong.
type reader struct {
	problems
	root   reflect.Type    // of what is read
	given  map[string]bool // paths of the keys that the file has
	nodes  int             // values seen, aliases followed
	octets int             // of their text
	done   bool            // there is no sense in reading on
}

// stop refuses the file for good.
func (r *reader) stop(path, format string, args ...any) {
	if !r.done {
		r.refuse(path, format, args...)
		r.done = true
	}
}

// enough says whether reading on makes no sense: a limit was met, or so many things are wrong that nobody reads on either.
func (r *reader) enough() bool {
	if len(r.problems) >= maxProblems {
		r.stop("", "there may be more: only so many problems are told at once")
	}
	return r.done
}

// take counts a value, and the octets of a text, which may be there many times over by aliases.
func (r *reader) take(path string, nodes, octets int) bool {
	r.nodes += nodes
	r.octets += octets
	if r.nodes > maxNodes {
		r.stop(path, "with its aliases followed the file has more than %d values", maxNodes)
	}
	if r.octets > maxFile {
		r.stop(path, "with its aliases followed the file has more than %d octets of text", maxFile)
	}
	return !r.enough()
}

// value puts node into the variable into.
func (r *reader) value(path string, node any, into reflect.Value) {
	if !r.take(path, 1, 0) {
		return
	}
	if into.Type() == reflect.TypeFor[Duration]() {
		r.duration(path, node, into)
		return
	}
	switch into.Kind() {
	case reflect.Struct:
		r.section(path, node, into)
	case reflect.Map:
		r.entries(path, node, into)
	case reflect.Slice:
		r.list(path, node, into)
	case reflect.String:
		if text, ok := r.text(path, node); ok {
			into.SetString(text)
		}
	case reflect.Bool:
		if b, ok := node.(bool); ok {
			into.SetBool(b)
		} else {
			r.mismatch(path, "true or false", node)
		}
	case reflect.Int:
		if n, ok := node.(int); ok {
			into.SetInt(int64(n))
		} else {
			r.mismatch(path, "a whole number", node)
		}
	case reflect.Float64:
		switch n := node.(type) {
		case int:
			into.SetFloat(float64(n))
		case float64:
			into.SetFloat(n)
		default:
			r.mismatch(path, "a number", node)
		}
	default:
		panic("config: no rule for the type " + into.Type().String()) // a defect: the types are those of Config and Agent
	}
}

// section reads a mapping whose keys are the fields of a struct.
func (r *reader) section(path string, node any, into reflect.Value) {
	if node == nil {
		return
	}
	mapping, keys, ok := r.mapping(path, node)
	if !ok {
		return
	}
	fields := map[string]int{}
	for i := range into.NumField() {
		fields[into.Type().Field(i).Tag.Get("yaml")] = i
	}
	for _, key := range keys {
		if r.enough() {
			return
		}
		field, known := fields[key]
		if !known {
			r.refuse(at(path, key), "%s", unknown(r.root, into.Type(), path, key))
			continue
		}
		r.given[at(path, key)] = true
		r.value(at(path, key), mapping[key], into.Field(field))
	}
}

// entries reads a mapping whose keys are names. Each entry begins with the defaults of its type.
func (r *reader) entries(path string, node any, into reflect.Value) {
	if node == nil {
		return
	}
	mapping, keys, ok := r.mapping(path, node)
	if !ok {
		return
	}
	for _, key := range keys {
		if r.enough() {
			return
		}
		if len(key) > maxName {
			r.refuse(at(path, key), "the name has more than %d octets", maxName)
			continue
		}
		r.given[at(path, key)] = true
		entry := fresh(into.Type().Elem())
		r.value(at(path, key), mapping[key], entry)
		into.SetMapIndex(reflect.ValueOf(key), entry)
	}
}

func (r *reader) list(path string, node any, into reflect.Value) {
	items, ok := node.([]any)
	if !ok {
		if node == nil {
			r.refuse(path, "there is nothing behind the key: write a list, [] for an empty one, or leave the key out")
		} else {
			r.mismatch(path, `a list (lines that begin with "- ")`, node)
		}
		return
	}
	into.SetZero()
	for i, item := range items {
		if r.enough() {
			return
		}
		entry := fresh(into.Type().Elem())
		if item == nil {
			r.refuse(fmt.Sprintf("%s[%d]", path, i), "there is nothing behind the dash")
			continue
		}
		r.value(fmt.Sprintf("%s[%d]", path, i), item, entry)
		into.Set(reflect.Append(into, entry))
	}
}

// fresh is a value of a repeated type with its defaults.
func fresh(t reflect.Type) reflect.Value {
	v := reflect.New(t).Elem()
	switch p := v.Addr().Interface().(type) {
	case *Profile:
		*p = defaultProfile()
	case *TokenIssuer:
		*p = DefaultTokenIssuer()
	case *AgentWorkload:
		*p = DefaultAgentWorkload()
	case *AgentSocket:
		*p = DefaultAgentSocket()
	}
	return v
}

// mapping gives a mapping's values by key, and the keys in a stable order.
func (r *reader) mapping(path string, node any) (mapping map[string]any, keys []string, ok bool) {
	raw, ok := node.(map[any]any)
	if !ok {
		r.mismatch(path, `keys with values ("key: value")`, node)
		return nil, nil, false
	}
	mapping = map[string]any{}
	for key, value := range raw {
		text, ok := key.(string)
		if !r.take(path, 1, len(text)) {
			return nil, nil, false
		}
		if !ok {
			r.refuse(path, "the key %s is not text: put it in quotes", describe(key))
			continue
		}
		if !printable(text) {
			r.refuse(path, "the key %.40q has characters that cannot be seen", text)
			continue
		}
		mapping[text] = value
	}
	return mapping, slices.Sorted(maps.Keys(mapping)), true
}

func (r *reader) text(path string, node any) (string, bool) {
	text, ok := node.(string)
	if !ok {
		switch node.(type) {
		case nil:
			r.refuse(path, `there is nothing behind the key: write a value, "" for an empty one, or leave the key out`)
		case map[any]any, []any:
			r.mismatch(path, "text", node)
		default:
			r.refuse(path, "expected text, got %s: put it in quotes", describe(node))
		}
		return "", false
	}
	if !r.take(path, 0, len(text)) {
		return "", false
	}
	if !printable(text) {
		r.refuse(path, "%.40q has characters that cannot be seen", text)
		return "", false
	}
	return text, true
}

func (r *reader) duration(path string, node any, into reflect.Value) {
	switch v := node.(type) {
	case string:
		d, err := ParseDuration(v)
		if err != nil {
			r.refuse(path, "%v", err)
			return
		}
		into.SetInt(int64(d))
	case int:
		if v != 0 {
			r.refuse(path, "expected a duration, got the number %d: add a unit, like \"%ds\" or \"%dh\"", v, v, v)
			return
		}
		into.SetInt(0)
	default:
		r.mismatch(path, `a duration like "24h", "90m" or "7d"`, node)
	}
}

func (r *reader) mismatch(path, expected string, node any) {
	r.refuse(path, "expected %s, got %s", expected, describe(node))
}

// describe names a decoded YAML value for people.
func describe(node any) string {
	switch v := node.(type) {
	case nil:
		return "nothing"
	case string:
		return fmt.Sprintf("the text %.40q", v)
	case bool:
		return fmt.Sprint(v)
	case map[any]any:
		return "keys with values"
	case []any:
		return "a list"
	}
	return fmt.Sprintf("the number %v", node)
}

// printable says whether a text is UTF-8 without control characters and the like, which hide in a path or a log.
func printable(text string) bool {
	return utf8.ValidString(text) && !strings.ContainsFunc(text, func(c rune) bool { return c != ' ' && !unicode.IsGraphic(c) || c == utf8.RuneError })
}

var plainKey = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

// at is the path of a key below a path.
func at(path, key string) string {
	if !plainKey.MatchString(key) {
		return fmt.Sprintf("%s[%q]", path, shorten(key))
	}
	if path == "" {
		return key
	}
	return path + "." + key
}

// shorten cuts a text that is too long for an error, with a sign that it did.
func shorten(text string) string {
	if len(text) <= maxName {
		return text
	}
	return strings.ToValidUTF8(text[:maxName], "") + "…"
}
