// Package pemfile reads PEM as people and other programs leave it: several blocks, with text between them. Nothing that is in a file is passed over without a word.
package pemfile

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
)

const (
	certificateType = "CERTIFICATE" // RFC 7468 5
	maxFile         = 1 << 20       // octets
)

// Blocks takes a file apart. pem.Decode passes over what it cannot read, such as a block without an end; here that is an error.
func Blocks(text []byte) ([]*pem.Block, error) {
	var blocks []*pem.Block
	for rest := text; ; {
		block, more := pem.Decode(rest)
		if block == nil {
			break
		}
		blocks, rest = append(blocks, block), more
	}
	if begun := bytes.Count(text, []byte("-----BEGIN ")); begun != len(blocks) {
		return nil, fmt.Errorf("%d PEM blocks begin in it and %d can be read: it is damaged or cut off", begun, len(blocks))
	}
	return blocks, nil
}

// Certificates returns those of a file that holds nothing else, in their order. There may be none.
func Certificates(text []byte) (all []*x509.Certificate, err error) {
	blocks, err := Blocks(text)
	if err != nil {
		return nil, err
	}
	for _, block := range blocks {
		if block.Type != certificateType {
			return nil, fmt.Errorf("it holds a PEM block %.40q: only certificates belong there", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("its certificate number %d: %w", len(all)+1, err)
		}
		all = append(all, cert)
	}
	return all, nil
}

// ReadCertificates reads a file of at least one certificate, and of nothing else. It waits for no pipe, and reads no more than 1 MiB.
func ReadCertificates(path string) ([]*x509.Certificate, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxFile {
		return nil, fmt.Errorf("%s is not a file of at most %d octets", path, maxFile)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	all, err := Certificates(text)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("%s has no certificate in PEM", path)
	}
	return all, nil
}
