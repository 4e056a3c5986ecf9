package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kedge/ca/atomicfile"
	"kedge/ca/ledger"
	"kedge/issuer/istio"
)

// The files of an SVID, named as istio-agent names them, so that the folder serves as its PROV_CERT.
const (
	chainFile = "cert-chain.pem"
	keyFile   = "key.pem"
	rootFile  = "root-cert.pem"
)

func newSVIDCommand(t *target) *cobra.Command {
	c := &cobra.Command{Use: "svid", Short: "SVIDs, for machines without an agent"}
	c.AddCommand(newSVIDFetchCommand(t), newSVIDRevokeCommand(t))
	return c
}

// fetch is what 'kedge svid fetch' was told.
type fetch struct {
	server, root, tokenFile, out, keyType string
	ttl, timeout                          time.Duration
	renew, asJSON                         bool
}

func newSVIDFetchCommand(t *target) *cobra.Command {
	var f fetch
	c := &cobra.Command{
		Use: "fetch --server HOST:PORT --root FILE --token-file FILE --out DIR", Short: "Get one SVID and write it to files", Args: cobra.NoArgs,
		Long: `Make a key on this machine, have its SVID issued by a CA's CSR API, and write cert-chain.pem, key.pem and root-cert.pem (0600). The key
never leaves the machine. On the CA's own machine --server and --root may be left out: the running CA is asked.

With --renew the SVID that is in --out already proves who is asking, and no token is needed.`,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return usageError{err}
			}
			ctx, cancel := context.WithTimeout(c.Context(), f.timeout)
			defer cancel()
			if f.server == "" || f.root == "" {
				client, err := t.client()
				if err != nil {
					return err
				}
				running, err := client.Status(ctx)
				if err != nil {
					return fmt.Errorf("--server and --root were not both given, so the CA on this machine was asked: %w", err)
				}
				if f.server == "" {
					f.server = running.CSRAddress
				}
				if f.root == "" {
					f.root = running.RootFile
				}
			}
			return f.run(ctx, c.OutOrStdout())
		},
	}
	c.Flags().StringVar(&f.server, "server", "", "address of the CSR API, such as ca.example.org:15012")
	c.Flags().StringVar(&f.root, "root", "", "PEM file with the roots that the server must prove itself under")
	c.Flags().StringVar(&f.tokenFile, "token-file", "", "file with a token; - reads it from standard input")
	c.Flags().StringVar(&f.out, "out", "", "folder for the files; made if need be")
	c.Flags().BoolVar(&f.asJSON, "json", false, "print JSON")
	c.Flags().BoolVar(&f.renew, "renew", false, "prove who is asking with the SVID that is in --out")
	c.Flags().StringVar(&f.keyType, "key-type", "P-256", "type of the new key: "+strings.Join(keyTypes, ", "))
	c.Flags().DurationVar(&f.ttl, "ttl", 0, "how long the SVID shall be valid; 0: the CA's default")
	c.Flags().DurationVar(&f.timeout, "timeout", 30*time.Second, "how long to try")
	return c
}

func (f *fetch) check() error {
	switch {
	case f.out == "":
		return errors.New("--out is missing: the folder for the SVID's files")
	case f.tokenFile == "" && !f.renew:
		return errors.New("--token-file is missing ('kedge token create' on the CA's machine makes a token), or --renew")
	case f.timeout <= 0:
		return fmt.Errorf("--timeout %s is not positive", f.timeout)
	case f.ttl < 0 || f.ttl%time.Second != 0:
		return fmt.Errorf("--ttl %s is not a whole number of seconds from 0 on", f.ttl)
	case !slices.Contains(keyTypes, f.keyType):
		return fmt.Errorf("--key-type %q is none of %s", f.keyType, strings.Join(keyTypes, ", "))
	}
	return nil
}

func (f *fetch) run(ctx context.Context, out io.Writer) error {
	roots, err := readRoots(f.root)
	if err != nil {
		return err
	}
	token, err := readToken(f.tokenFile)
	if err != nil {
		return err
	}
	var proof *tls.Certificate
	if f.renew {
		certificate, err := tls.LoadX509KeyPair(filepath.Join(f.out, chainFile), filepath.Join(f.out, keyFile))
		if err != nil {
			return fmt.Errorf("reading the SVID to renew: %w", err)
		}
		proof = &certificate
	}
	if err := os.MkdirAll(f.out, 0o700); err != nil {
		return fmt.Errorf("making the folder for the SVID: %w", err)
	}
	key, err := makeKey(f.keyType)
	if err != nil {
		return fmt.Errorf("making the key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return fmt.Errorf("making the CSR: %w", err)
	}
	client, err := istio.Dial(f.server, roots, proof)
	if err != nil {
		return err
	}
	defer client.Close()
	chain, bundle, err := client.Sign(ctx, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}), token, f.ttl)
	if err != nil {
		return fmt.Errorf("the CA at %s gave no SVID: %w", f.server, f.explain(err))
	}
	return f.write(out, key, strings.Join(chain, ""), bundle)
}

// explain says what to do about a refusal.
func (f *fetch) explain(err error) error {
	s := status.Convert(err)
	switch s.Code() {
	case codes.Unauthenticated:
		if f.tokenFile == "" {
			return fmt.Errorf("%s. The SVID in %s no longer proves who is asking: begin anew with a token", s.Message(), f.out)
		}
		return fmt.Errorf("%s. A join token serves once and for a short time: make a new one with 'kedge token create'", s.Message())
	case codes.Unavailable, codes.DeadlineExceeded:
		return fmt.Errorf("%s. Is the CA running there, and does --root belong to it?", s.Message())
	}
	return fmt.Errorf("%s: %s", s.Code(), s.Message())
}

// write checks what came, and writes it. The files appear one after the other, each whole.
func (f *fetch) write(out io.Writer, key crypto.Signer, chain, bundle string) error {
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encoding the key: %w", err)
	}
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
	svid, err := x509svid.Parse([]byte(chain), keyPEM)
	if err != nil {
		return fmt.Errorf("what the CA sent is no SVID for the key: %w", err)
	}
	for _, file := range []struct {
		name string
		data []byte
	}{{keyFile, keyPEM}, {chainFile, []byte(chain)}, {rootFile, []byte(bundle)}} {
		if err := atomicfile.Write(filepath.Join(f.out, file.name), file.data); err != nil {
			return err
		}
	}
	leaf := svid.Certificates[0]
	if f.asJSON {
		return printJSON(out, map[string]any{
			"spiffe_id": svid.ID.String(), "serial": ledger.Serial(leaf.SerialNumber.Bytes()), "not_before": leaf.NotBefore.UTC(), "not_after": leaf.NotAfter.UTC(),
			"chain_file": filepath.Join(f.out, chainFile), "key_file": filepath.Join(f.out, keyFile), "root_file": filepath.Join(f.out, rootFile),
		})
	}
	table := newTable(out)
	table.row("SPIFFE ID", svid.ID.String())
	table.row("serial", ledger.Serial(leaf.SerialNumber.Bytes()).String())
	table.row("valid from", leaf.NotBefore.UTC().Format(time.RFC3339))
	table.row("valid until", people(leaf.NotAfter))
	for i, cert := range svid.Certificates[1:] {
		table.row(fmt.Sprintf("chain %d", i+1), fmt.Sprintf("%s, until %s", cert.Subject, cert.NotAfter.UTC().Format(time.RFC3339)))
	}
	table.row("written to", fmt.Sprintf("%s (%s, %s, %s)", f.out, chainFile, keyFile, rootFile))
	return table.Flush()
}

func readRoots(path string) (*x509.CertPool, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading the roots: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("reading the roots: %s has no certificate in PEM", path)
	}
	return pool, nil
}

const maxToken = 16 << 10 // octets, as the CA has it

// readToken reads the token; path "" is none.
func readToken(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	in := io.Reader(os.Stdin)
	if path != "-" {
		file, err := os.Open(path)
		if err != nil {
			return "", fmt.Errorf("reading the token: %w", err)
		}
		defer file.Close()
		in = file
	}
	text, err := io.ReadAll(io.LimitReader(in, maxToken+1))
	if err != nil {
		return "", fmt.Errorf("reading the token: %w", err)
	}
	token := strings.TrimSpace(string(text))
	if token == "" || len(text) > maxToken {
		return "", fmt.Errorf("reading the token: %s holds %d octets, not a token", path, len(text))
	}
	return token, nil
}

// keyTypes are those that makeKey makes.
var keyTypes = []string{"P-256", "P-384", "RSA-2048"}

func makeKey(kind string) (crypto.Signer, error) {
	switch kind {
	case "P-384":
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "RSA-2048":
		return rsa.GenerateKey(rand.Reader, 2048)
	}
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}
