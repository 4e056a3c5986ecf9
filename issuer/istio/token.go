package istio

import (
	"fmt"
	"io"
	"os"
	"strings"
)

const maxToken = 16 << 10 // octets, as the CA has it

// ReadTokenFile reads a token from a file. White space around it is dropped.
func ReadTokenFile(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close() // it was only read
	return ReadToken(file, path)
}

// ReadToken reads a token from what is called source in errors.
func ReadToken(r io.Reader, source string) (string, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxToken+1))
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(text))
	if token == "" || len(text) > maxToken {
		return "", fmt.Errorf("%s holds %d octets, not a token", source, len(text))
	}
	return token, nil
}
