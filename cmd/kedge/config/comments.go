package config

import (
	_ "embed"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"strings"
)

//go:embed config.go
var declarations string

//go:embed agent.go
var agentDeclarations string

// Comments returns the comment of each field of each struct of this package's config.go and agent.go, by "Struct.Field", and what the package says of itself.
// They are what people read about a key: in docs/configuration.md and docs/agent-configuration.md, and in what "kedge init" writes.
func Comments() (fields map[string]string, intro string, err error) {
	fields = map[string]string{}
	file, err := comments(fields, "config.go", declarations)
	if err == nil {
		_, err = comments(fields, "agent.go", agentDeclarations)
	}
	if err != nil {
		return nil, "", fmt.Errorf("reading the declarations of the configuration: %w", err)
	}
	_, intro, _ = strings.Cut(file.Doc.Text(), "\n\n")
	return fields, intro, nil
}

func comments(fields map[string]string, name, text string) (*ast.File, error) {
	file, err := parser.ParseFile(token.NewFileSet(), name, text, parser.ParseComments)
	if err != nil {
		return nil, err
	}
	ast.Inspect(file, func(node ast.Node) bool {
		spec, ok := node.(*ast.TypeSpec)
		if !ok {
			return true
		}
		if structure, ok := spec.Type.(*ast.StructType); ok {
			for _, field := range structure.Fields.List {
				for _, name := range field.Names {
					fields[spec.Name.Name+"."+name.Name] = strings.TrimSpace(field.Doc.Text())
				}
			}
		}
		return true
	})
	return file, nil
}
