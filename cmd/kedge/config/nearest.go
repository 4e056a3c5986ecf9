package config

import (
	"fmt"
	"reflect"
	"strings"
)

// unknown says what to write in place of a key that a section does not have: the nearest of its keys, else where a key of
// that name stands, else which keys there are.
func unknown(root, section reflect.Type, path, key string) string {
	var names []string
	best, distance := "", 1+len(key)/4
	for i := range section.NumField() {
		name := section.Field(i).Tag.Get("yaml")
		names = append(names, name)
		if d := editDistance(strings.ToLower(key), strings.ToLower(name)); d <= distance {
			if best == "" || d < distance {
				best, distance = name, d
			}
		}
	}
	if best != "" {
		return fmt.Sprintf("unknown key; the nearest valid one is %s", at(path, best))
	}
	if elsewhere := find(root, "", key); len(elsewhere) > 0 {
		return fmt.Sprintf("unknown key here; there is %s", strings.Join(elsewhere, " and "))
	}
	return fmt.Sprintf("unknown key; valid ones here are %s", strings.Join(names, ", "))
}

// find gives the paths of the keys of that name, in any case of letters.
func find(t reflect.Type, path, key string) []string {
	var paths []string
	switch t.Kind() {
	case reflect.Slice:
		return find(t.Elem(), path+"[]", key)
	case reflect.Map:
		return find(t.Elem(), path+".<name>", key)
	case reflect.Struct:
		for i := range t.NumField() {
			name := t.Field(i).Tag.Get("yaml")
			if strings.EqualFold(name, key) {
				paths = append(paths, at(path, name))
			}
			paths = append(paths, find(t.Field(i).Type, at(path, name), key)...)
		}
	}
	return paths
}

// editDistance is how many letters must be added, left out, replaced or swapped with their neighbour to make b of a
// (optimal string alignment). Long texts are near to nothing.
func editDistance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return max(len(a), len(b))
	}
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			replace := rows[i-1][j-1]
			if a[i-1] != b[j-1] {
				replace++
			}
			rows[i][j] = min(replace, rows[i-1][j]+1, rows[i][j-1]+1)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}
