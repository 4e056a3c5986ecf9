package main

import (
	"cmp"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kedge/ca/atomicfile"
	"kedge/ca/ledger"
	"kedge/cmd/kedge/config"
	"kedge/issuer/admin"
	"kedge/issuer/istio"
)

func newSVIDCommand(t *target) *cobra.Command {
	c := &cobra.Command{Use: "svid", Short: "SVIDs, for machines without an agent"}
	c.AddCommand(newSVIDFetchCommand(t), newSVIDRevokeCommand(t))
	return c
}

// fetch is what 'kedge svid fetch' was told.
type fetch struct {
	server, root, tokenFile, out, keyType string
	ttl, timeout                          config.Duration
	renew, asJSON                         bool
}

func newSVIDFetchCommand(t *target) *cobra.Command {
	f := fetch{timeout: config.Duration(30 * time.Second)}
	c := &cobra.Command{
		Use: "fetch --server HOST:PORT --root FILE --token-file FILE --out DIR", Short: "Get one SVID and write it to files", Args: arguments(),
		Long: `Make a key on this machine, have its SVID issued by a CA's CSR API, and write cert-chain.pem, key.pem and root-cert.pem (0600). The key
never leaves the machine. On the CA's own machine --server and --root may be left out: the running CA is asked.

With --renew the SVID that is in --out already proves who is asking, and no token is needed; with --server, --root is then root-cert.pem in --out
unless it is given.

The three files change at one instant: they are links through --out/..data, which is exchanged as a whole. When the CA is not there yet, or cannot
issue now, it is asked again until --timeout has passed. A refusal that stays one ends the command at once. What came is written only if the SVID
verifies under the trust bundle that came with it.`,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := f.check(); err != nil {
				return usageError{err}
			}
			ctx, cancel := context.WithTimeout(c.Context(), f.timeout.Std())
			defer cancel()
			return f.run(ctx, t, c.OutOrStdout(), c.ErrOrStderr())
		},
	}
	c.Flags().StringVar(&f.server, "server", "", "address of the CSR API, such as ca.example.org:15012")
	c.Flags().StringVar(&f.root, "root", "", "PEM file with the roots that the server must prove itself under")
	c.Flags().StringVar(&f.tokenFile, "token-file", "", "file with a token; - reads it from standard input")
	c.Flags().StringVar(&f.out, "out", "", "folder for the files; made if need be")
	c.Flags().BoolVar(&f.asJSON, "json", false, "print JSON")
	c.Flags().BoolVar(&f.renew, "renew", false, "prove who is asking with the SVID that is in --out")
	c.Flags().StringVar(&f.keyType, "key-type", "P-256", "type of the new key: "+strings.Join(istio.KeyTypes, ", "))
	c.Flags().Var(&f.ttl, "ttl", "how long the SVID shall be valid, such as 12h or 1d; 0s: the CA's default")
	c.Flags().Var(&f.timeout, "timeout", "how long to try, and to wait for the token")
	return c
}

func (f *fetch) check() error {
	switch {
	case f.out == "":
		return errors.New("--out is missing: the folder for the SVID's files")
	case f.tokenFile == "" && !f.renew:
		return errors.New("--token-file is missing ('kedge token create' on the CA's machine makes a token), or --renew")
	case f.timeout == 0:
		return fmt.Errorf("--timeout %s is not more than 0", f.timeout)
	case f.ttl.Std()%time.Second != 0:
		return fmt.Errorf("--ttl %s is not a whole number of seconds", f.ttl)
	case f.server != "" && !isAddress(f.server):
		return fmt.Errorf("--server %q is not HOST:PORT", f.server)
	case !slices.Contains(istio.KeyTypes, f.keyType):
		return fmt.Errorf("--key-type %q is none of %s", f.keyType, strings.Join(istio.KeyTypes, ", "))
	}
	return nil
}

// isAddress says whether text is HOST:PORT.
func isAddress(text string) bool {
	host, port, err := net.SplitHostPort(text)
	return err == nil && host != "" && port != ""
}

func (f *fetch) run(ctx context.Context, t *target, out, log io.Writer) error {
	token, err := f.readToken(ctx)
	if err != nil {
		return fmt.Errorf("reading the token: %w", err)
	}
	if f.renew && f.server != "" && f.root == "" { // on another machine: the bundle that came with the SVID
		if kept := filepath.Join(f.out, istio.RootFile); exists(kept) {
			f.root = kept
		}
	}
	if f.server == "" || f.root == "" {
		if err := f.askHere(ctx, t, log); err != nil {
			return fmt.Errorf("--server and --root were not both given, so the CA on this machine was asked: %w", err)
		}
	}
	roots, err := readRoots(f.root)
	if err != nil {
		return err
	}
	proof, err := f.proof()
	if err != nil {
		return fmt.Errorf("reading the SVID to renew: %w", err)
	}
	if err := atomicfile.MakeFolder(f.out); err != nil { // before a token is spent
		return err
	}
	key, err := istio.NewKey(f.keyType)
	if err != nil {
		return fmt.Errorf("making the key: %w", err)
	}
	csr, err := istio.NewCSR(key)
	if err != nil {
		return err
	}
	client, err := istio.Dial(f.server, roots, proof)
	if err != nil {
		return err
	}
	defer client.Close()
	var signed *istio.Signed
	err = f.persist(ctx, log, func(ctx context.Context) (again bool, err error) {
		signed, err = client.Sign(ctx, csr, token, f.ttl.Std())
		return istio.Retryable(err), f.explain(err)
	})
	if err != nil {
		return fmt.Errorf("the CA at %s gave no SVID: %w", f.server, err)
	}
	return f.write(out, key, strings.Join(signed.Chain, ""), signed.Bundle)
}

// askHere asks the CA on this machine for what was not given.
func (f *fetch) askHere(ctx context.Context, t *target, log io.Writer) error {
	client, err := t.client()
	if err != nil {
		return err
	}
	return f.persist(ctx, log, func(ctx context.Context) (again bool, err error) {
		running, err := client.Status(ctx)
		if err != nil {
			return errors.Is(err, admin.ErrNotRunning) || errors.Is(err, context.DeadlineExceeded), err
		}
		f.server, f.root = cmp.Or(f.server, running.CSRAddress), cmp.Or(f.root, running.RootFile)
		return false, nil
	})
}

// proof is the SVID that is there, or nil when it shall prove nothing.
func (f *fetch) proof() (*tls.Certificate, error) {
	if !f.renew {
		return nil, nil
	}
	return istio.ReadClientCertificate(f.out)
}

// How the CA is asked again. A machine of many that start together does not know of the others, so the waits differ by chance.
const (
	firstLimit  = 15 * time.Second       // how long the first try may take, doubled for each: a CA by default lets a call take less (csr.callTimeout)
	firstWait   = 200 * time.Millisecond // before the second try, doubled up to …
	longestWait = 5 * time.Second
)

// persist tries until it succeeds, until a failure is one that stays (again is false), or until ctx ends. Then its error says how long it
// was tried, and wraps the last failure.
func (f *fetch) persist(ctx context.Context, log io.Writer, try func(context.Context) (again bool, err error)) error {
	var last error
	for tries, wait, limit := 1, firstWait, firstLimit; ; tries, limit = tries+1, 2*limit {
		limited, cancel := context.WithTimeout(ctx, limit)
		again, err := try(limited)
		cancel()
		if err == nil || !again && ctx.Err() == nil {
			return err
		}
		if last == nil || ctx.Err() == nil { // a try that was cut short says less than the one before
			last = err
		}
		if tries == 1 && ctx.Err() == nil {
			fmt.Fprintf(log, "kedge: trying again until %s have passed (--timeout): %v\n", f.timeout, err)
		}
		timer := time.NewTimer(wait/2 + mathrand.N(wait/2))
		select {
		case <-timer.C:
			wait = min(2*wait, longestWait)
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("%s; tries: %d, the last one: %w", f.over(ctx), tries, last)
		}
	}
}

// over says why there is no more trying.
func (f *fetch) over(ctx context.Context) string {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fmt.Sprintf("not within %s (--timeout)", f.timeout)
	}
	return context.Cause(ctx).Error() // a signal
}

// explain says what to do about a refusal; nil is none.
func (f *fetch) explain(err error) error {
	if errors.Is(err, istio.ErrUntrusted) {
		return fmt.Errorf("%w. Does --root belong to this CA, and is the name among its csr.serverNames?", err)
	}
	s := status.Convert(err)
	switch s.Code() {
	case codes.OK:
		return nil
	case codes.Unauthenticated:
		if f.tokenFile == "" {
			return fmt.Errorf("%s. The SVID in %s no longer proves who is asking: begin anew with a token", s.Message(), f.out)
		}
		return fmt.Errorf("%s. A join token serves once and for a short time: make a new one with 'kedge token create'", s.Message())
	case codes.Unavailable, codes.DeadlineExceeded:
		return fmt.Errorf("%s. Is the CA running there?", s.Message())
	}
	return fmt.Errorf("%s: %s", s.Code(), s.Message())
}

// write checks what came, and writes it. What is there is replaced by nothing that does not hold together.
func (f *fetch) write(out io.Writer, key crypto.Signer, chain, bundle string) error {
	svid, err := istio.ReadSVID(key, chain, bundle, time.Now())
	switch {
	case errors.Is(err, istio.ErrUnverified):
		return fmt.Errorf("the SVID that the CA at %s sent is not used, and %s is as it was: %w. Is this machine's clock right, and what does 'kedge doctor' say at the CA?", f.server, f.out, err)
	case err != nil:
		return fmt.Errorf("what the CA at %s sent is no SVID for the key; %s is as it was: %w", f.server, f.out, err)
	}
	if err := atomicfile.WriteSet(f.out, svid.Files()); err != nil {
		return err
	}
	leaf := svid.Leaf()
	if f.asJSON {
		document := map[string]any{
			"spiffe_id": svid.ID.String(), "serial": ledger.Serial(leaf.SerialNumber.Bytes()), "not_before": leaf.NotBefore.UTC(), "not_after": leaf.NotAfter.UTC(),
			"chain_file": filepath.Join(f.out, istio.ChainFile), "key_file": filepath.Join(f.out, istio.KeyFile), "root_file": filepath.Join(f.out, istio.RootFile),
		}
		if f.clamped(leaf) {
			document["clamped_from"] = int64(f.ttl.Std() / time.Second) // as the ledger has it
		}
		return printJSON(out, document)
	}
	table := newTable(out)
	table.row("SPIFFE ID", svid.ID.String())
	table.row("serial", ledger.Serial(leaf.SerialNumber.Bytes()).String())
	table.row("valid from", leaf.NotBefore.UTC().Format(time.RFC3339))
	table.row("valid until", people(leaf.NotAfter))
	if f.clamped(leaf) {
		table.row("asked for", fmt.Sprintf("%s, which the CA clamped: more is not granted", f.ttl))
	}
	for i, cert := range svid.Certificates[1:] {
		table.row(fmt.Sprintf("chain %d", i+1), fmt.Sprintf("%s, until %s", cert.Subject, cert.NotAfter.UTC().Format(time.RFC3339)))
	}
	table.row("written to", fmt.Sprintf("%s (%s, %s, %s)", f.out, istio.ChainFile, istio.KeyFile, istio.RootFile))
	return table.Flush()
}

// clamped says whether the CA granted less than what was asked for, which it does above a profile's maximum. It goes by the certificate's own two times,
// since the clocks of two machines differ; notBefore lies somewhat before the time of issue.
func (f *fetch) clamped(leaf *x509.Certificate) bool {
	return leaf.NotAfter.Sub(leaf.NotBefore) < f.ttl.Std()
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// readToken reads the token, if there is to be one, for no longer than ctx.
func (f *fetch) readToken(ctx context.Context) (string, error) {
	if f.tokenFile == "" {
		return "", nil
	}
	type outcome struct {
		token string
		err   error
	}
	read := make(chan outcome, 1)
	go func() { // a pipe into which nobody writes holds it until the process ends
		token, err := readTokenFile(f.tokenFile)
		read <- outcome{token, err}
	}()
	select {
	case o := <-read:
		return o.token, o.err
	case <-ctx.Done():
		return "", fmt.Errorf("%s did not come to its end: %s", source(f.tokenFile), f.over(ctx))
	}
}

func readTokenFile(path string) (string, error) {
	if path == "-" {
		return istio.ReadToken(os.Stdin, source(path))
	}
	return istio.ReadTokenFile(path)
}

// source names where a token comes from.
func source(path string) string {
	if path == "-" {
		return "standard input"
	}
	return path
}
