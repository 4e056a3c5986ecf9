package vault

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"
)

// maxAnswer is the size of the largest answer that is read, in octets. Vault's are of some KiB.
const maxAnswer = 1 << 20

var errTooLarge = fmt.Errorf("its answer is larger than the %d octets that are read: whatever answers there is no Vault", maxAnswer)

// checkAddress allows https, and http to this machine only, where an agent or a proxy of Vault may listen: the token goes there in clear.
func checkAddress(address string) error {
	u, err := url.Parse(address)
	if err != nil {
		return fmt.Errorf("the address %q of Vault: %w", address, err)
	}
	if u.Host == "" || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("the address %q of Vault is no address: write https://HOST or https://HOST:PORT", u.Redacted())
	}
	switch u.Scheme {
	case "https":
		return nil
	case "http":
		if ip := net.ParseIP(u.Hostname()); u.Hostname() == "localhost" || ip != nil && ip.IsLoopback() {
			return nil
		}
		return fmt.Errorf("the address %q of Vault is http, which would send the token in clear over the network: use https", address)
	}
	return fmt.Errorf("the address %q of Vault begins with neither https:// nor http://", address)
}

// connection is a Vault as one token sees it. It is never changed: another login, and a reconnection, make another one, which reads the files of
// certificates anew.
type connection struct {
	api       *api.Client
	transport *http.Transport
	secrets   []string // that are sent over it
}

// connect opens nothing yet; the first call does.
func (o ClientOptions) connect(token string) (*connection, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: o.ServerName}
	if o.CAFile != "" {
		text, err := readFile(o.CAFile, 0)
		if err != nil {
			return nil, fmt.Errorf("the CA of Vault: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("the CA of Vault: %s holds no certificate in PEM", o.CAFile)
		}
	}
	if c := o.Login.Certificate; c != nil {
		pair, err := c.read()
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{pair}
	}
	transport := &http.Transport{
		Proxy: http.ProxyFromEnvironment, DialContext: (&net.Dialer{Timeout: o.Timeout}).DialContext, TLSClientConfig: config, TLSHandshakeTimeout: o.Timeout,
		ForceAttemptHTTP2: true, MaxIdleConnsPerHost: 16, IdleConnTimeout: 90 * time.Second, MaxResponseHeaderBytes: 64 << 10,
		HTTP2: &http.HTTP2Config{SendPingTimeout: o.Timeout, PingTimeout: o.Timeout}, // a connection that a firewall forgot is not waited for
	}
	client, err := api.NewClient(&api.Config{
		Address: o.Address, MinRetryWait: time.Second, MaxRetryWait: time.Second, // with MaxRetries 0 there is none
		HttpClient: &http.Client{Transport: bounded{transport}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
	})
	if err != nil {
		return nil, fmt.Errorf("preparing calls to Vault (a VAULT_… variable in the environment that cannot be read is enough for that, though its value is not used: unset it): %w", err)
	}
	// What NewClient took from the environment, and what NewRequest would, is overwritten.
	client.SetToken(token)
	client.SetHeaders(http.Header{api.RequestHeaderName: {"true"}}) // the namespace is one of them
	if o.Namespace != "" {
		client.SetNamespace(o.Namespace)
	}
	client.SetWrappingLookupFunc(func(string, string) string { return "" })
	return &connection{client, transport, []string{token}}, nil
}

// close lets go of connections once the calls on them are over.
func (c *connection) close() { c.transport.CloseIdleConnections() }

// bounded ends answers that are too large.
type bounded struct{ http.RoundTripper }

func (b bounded) RoundTrip(request *http.Request) (*http.Response, error) {
	response, err := b.RoundTripper.RoundTrip(request)
	if err == nil {
		response.Body = &boundedBody{response.Body, maxAnswer}
	}
	return response, err
}

type boundedBody struct {
	io.ReadCloser
	left int
}

func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left < 0 {
		return 0, errTooLarge
	}
	if len(p) > b.left+1 { // one more than allowed tells an answer that is too large from one that ends there
		p = p[:b.left+1]
	}
	n, err := b.ReadCloser.Read(p)
	if b.left -= n; b.left < 0 {
		return 0, errTooLarge
	}
	return n, err
}

// read returns the certificate and the key that Kedge presents.
func (c *CertificateLogin) read() (tls.Certificate, error) {
	cert, err := readFile(c.CertFile, 0)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("the certificate for logging in to Vault: %w", err)
	}
	key, err := readFile(c.KeyFile, 0o037)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("the key for logging in to Vault: %w", err)
	}
	defer clear(key)
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("the certificate %s and the key %s for logging in to Vault: %w", c.CertFile, c.KeyFile, err)
	}
	return pair, nil
}

// isTrust says whether err is about a server's certificate.
func isTrust(err error) bool {
	var verification *tls.CertificateVerificationError
	return errors.As(err, &verification)
}
