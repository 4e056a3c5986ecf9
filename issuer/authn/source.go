package authn

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
)

// Limits on what a key server may send.
const (
	maxJWKS         = 1 << 20  // octets of a JWKS or a discovery document
	maxBearer       = 64 << 10 // octets of the token that is shown to a key server
	maxHeaders      = 64 << 10 // octets of a response's header
	maxRedirects    = 3
	discoveryPath   = "/.well-known/openid-configuration" // OpenID Connect Discovery 4
	contentAccepted = "application/jwk-set+json, application/json"
)

// source is where the keys of an issuer come from: a file, a URL, or with neither OpenID Connect discovery.
type source struct {
	issuer, file, url, caFile, bearerFile string
}

func newSource(c IssuerConfig) (source, error) {
	s := source{issuer: c.Issuer, file: c.JWKSFile, url: c.JWKSURL, caFile: c.CAFile, bearerFile: c.BearerTokenFile}
	if s.file != "" && (s.url != "" || s.caFile != "" || s.bearerFile != "") {
		return s, errors.New("it has a JWKS file, and a URL, CA file or bearer token file too, which are for fetching: its keys come from one place")
	}
	if s.file != "" {
		return s, nil
	}
	first := s.url
	if first == "" {
		first = s.issuer
	}
	u, err := url.Parse(first)
	if err != nil {
		return s, fmt.Errorf("the URL for its keys: %w", err)
	}
	if err := checkURL(u); err != nil {
		return s, err
	}
	_, err = s.roots() // a file that is not there is a mistake; later it may change
	return s, err
}

// CheckCAFile says whether New can have the roots of a key server from the file.
func CheckCAFile(path string) error {
	_, err := source{caFile: path}.roots()
	return err
}

// CheckJWKSFile says whether an issuer's keys can be had from the file now. New does not need it: the file is read again and again.
func CheckJWKSFile(path string) error {
	raw, err := source{file: path}.read(context.Background()) // which a file does not need
	if err == nil {
		_, _, err = parseJWKS(raw)
	}
	return err
}

// CheckBearerTokenFile says whether the token for a key server can be had from the file now. New does not need it: the file is read for each fetch.
func CheckBearerTokenFile(path string) error {
	_, err := source{bearerFile: path}.bearer()
	return err
}

// String says where the keys come from.
func (s source) String() string {
	switch {
	case s.file != "":
		return s.file
	case s.url != "":
		return s.url
	}
	return strings.TrimSuffix(s.issuer, "/") + discoveryPath
}

// checkURL lets keys come over https only; over http from this machine itself.
func checkURL(u *url.URL) error {
	ip := net.ParseIP(u.Hostname())
	loopback := u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
	if u.Hostname() == "" || u.User != nil || u.Scheme != "https" && !(u.Scheme == "http" && loopback) {
		return fmt.Errorf("its keys would come from %q: that takes an https URL without a user (http only on a loopback address), or a JWKS file", u.Redacted())
	}
	return nil
}

func (s source) roots() (*x509.CertPool, error) {
	if s.caFile == "" {
		return nil, nil // the system's
	}
	text, err := os.ReadFile(s.caFile)
	if err != nil {
		return nil, fmt.Errorf("reading the roots that its key server proves itself under: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("reading the roots that its key server proves itself under: %s has no certificate in PEM", s.caFile)
	}
	return pool, nil
}

// read gets the JWKS.
func (s source) read(ctx context.Context) ([]byte, error) {
	if s.file != "" {
		file, err := os.Open(s.file)
		if err != nil {
			return nil, fmt.Errorf("reading the JWKS: %w", err)
		}
		defer file.Close()
		return readLimited(file, s.file, maxJWKS)
	}
	roots, err := s.roots()
	if err != nil {
		return nil, err
	}
	bearer, err := s.bearer()
	if err != nil {
		return nil, err
	}
	transport := &http.Transport{
		Proxy: http.ProxyFromEnvironment, TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, MaxResponseHeaderBytes: maxHeaders,
	}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, CheckRedirect: func(next *http.Request, via []*http.Request) error {
		switch {
		case len(via) > maxRedirects:
			return fmt.Errorf("it redirects more than %d times", maxRedirects)
		case next.URL.Scheme != via[0].URL.Scheme:
			return fmt.Errorf("it redirects from %s to %s", via[0].URL.Scheme, next.URL.Scheme)
		case bearer != "" && next.URL.Host != via[0].URL.Host:
			return errors.New("it redirects to another host, which must not get the bearer token")
		}
		return checkURL(next.URL)
	}}
	if s.url != "" {
		return get(ctx, client, s.url, bearer)
	}
	where, err := s.discover(ctx, client, bearer)
	if err != nil {
		return nil, err
	}
	return get(ctx, client, where, bearer)
}

// discover asks the issuer where its keys are. They may be on another host, which then gets the bearer token too: a Kubernetes API server
// names itself by its address there.
func (s source) discover(ctx context.Context, client *http.Client, bearer string) (string, error) {
	raw, err := get(ctx, client, s.String(), bearer)
	if err != nil {
		return "", err
	}
	var document struct {
		Issuer string `json:"issuer"`
		JWKS   string `json:"jwks_uri"`
	}
	if err := json.Unmarshal(raw, &document); err != nil {
		return "", fmt.Errorf("reading the discovery document %s: %s", s, brief(err))
	}
	if document.Issuer != s.issuer { // OpenID Connect Discovery 4.3
		return "", fmt.Errorf("the discovery document %s is for the issuer %.200q, not %q", s, document.Issuer, s.issuer)
	}
	u, err := url.Parse(document.JWKS)
	if err != nil {
		return "", fmt.Errorf("the discovery document %s has a bad jwks_uri: %s", s, brief(err))
	}
	return document.JWKS, checkURL(u)
}

// bearer reads the token for the key server anew, since it is replaced before it expires.
func (s source) bearer() (string, error) {
	if s.bearerFile == "" {
		return "", nil
	}
	file, err := os.Open(s.bearerFile)
	if err != nil {
		return "", fmt.Errorf("reading the bearer token for the key server: %w", err)
	}
	defer file.Close()
	text, err := readLimited(file, s.bearerFile, maxBearer)
	if err != nil {
		return "", fmt.Errorf("the bearer token for the key server: %w", err)
	}
	token := strings.TrimSpace(string(text))
	if token == "" || strings.ContainsAny(token, " \t\r\n") {
		return "", fmt.Errorf("reading the bearer token for the key server: %s does not hold one token", s.bearerFile)
	}
	return token, nil
}

func get(ctx context.Context, client *http.Client, where, bearer string) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, where, nil)
	if err != nil {
		return nil, fmt.Errorf("asking for the issuer's keys: %w", err)
	}
	request.Header.Set("Accept", contentAccepted)
	if bearer != "" {
		request.Header.Set("Authorization", "Bearer "+bearer)
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, fmt.Errorf("asking for the issuer's keys: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("asking for the issuer's keys: %s answered %.60s", where, response.Status)
	}
	return readLimited(response.Body, where, maxJWKS)
}

func readLimited(r io.Reader, where string, most int) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r, int64(most)+1))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", where, err)
	}
	if len(raw) > most {
		return nil, fmt.Errorf("reading %s: it has more than the %d octets that are read", where, most)
	}
	return raw, nil
}
