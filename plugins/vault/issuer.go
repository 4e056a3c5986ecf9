package vault

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"strings"
	"time"

	"kedge/ca"
	"kedge/ca/pemfile"
)

const organization = "Kedge"

// issuer is what signs in a mount: its certificates, and the path of the call by which it does.
type issuer struct {
	ca.Issuers
	path string
	old  bool // the mount is of a Vault before 1.11, which knows one issuer a mount, and no not_after
}

// issuer reads the issuer from Vault, and makes sure that it can certify an issuing CA.
func (r *Root) issuer(ctx context.Context) (*issuer, error) {
	base := r.o.Mount + "/issuer/" + r.o.Issuer
	var answer struct {
		Data struct {
			Certificate string   `json:"certificate"`
			CAChain     []string `json:"ca_chain"`
			Revoked     bool     `json:"revoked"`
			Usage       string   `json:"usage"`
		} `json:"data"`
	}
	err := r.o.Client.read(ctx, base, &answer)
	if answer := refused(err); answer != nil && answer.status == http.StatusNotFound && answer.says("unsupported path") && r.o.Issuer == defaultIssuer {
		return r.oldIssuer(ctx)
	}
	if err != nil {
		return nil, err
	}
	switch d := answer.Data; {
	case d.Revoked:
		return nil, fmt.Errorf("%s is revoked: configure another issuer, or make another one the mount's default", r)
	case d.Usage != "" && !strings.Contains(d.Usage, "issuing-certificates"):
		return nil, fmt.Errorf("%s may not issue certificates (its usage is %s): 'vault write %s usage=…,issuing-certificates' allows it", r, d.Usage, base)
	}
	chain, err := r.chain(answer.Data.Certificate, answer.Data.CAChain)
	if err != nil {
		return nil, err
	}
	return &issuer{Issuers: chain, path: base + "/sign-intermediate"}, nil
}

// oldIssuer reads the only issuer of a mount of before Vault 1.11.
func (r *Root) oldIssuer(ctx context.Context) (*issuer, error) {
	type answer struct {
		Data struct {
			Certificate string `json:"certificate"`
		} `json:"data"`
	}
	var own, above answer
	if err := r.o.Client.read(ctx, r.o.Mount+"/cert/ca", &own); err != nil {
		return nil, err
	}
	if err := r.o.Client.read(ctx, r.o.Mount+"/cert/ca_chain", &above); err != nil && !isAbsent(err) {
		return nil, err
	}
	chain, err := r.chain(own.Data.Certificate, []string{above.Data.Certificate})
	if err != nil {
		return nil, err
	}
	return &issuer{Issuers: chain, path: r.o.Mount + "/root/sign-intermediate", old: true}, nil
}

// chain makes sure that what the mount says of an issuer leads to a root, under which an issuing CA may stand now.
func (r *Root) chain(own string, others []string) (ca.Issuers, error) {
	cert, err := parseOne(own)
	if err != nil {
		return nil, fmt.Errorf("%s: what Vault gives as its certificate: %w", r, err)
	}
	pool, err := pemfile.Certificates([]byte(strings.Join(others, "\n")))
	if err != nil {
		return nil, fmt.Errorf("%s: what Vault gives as its chain: %w", r, err)
	}
	chain, err := ca.Climb(cert, pool)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: import what is missing in its mount with 'vault write %s/issuers/import/cert pem_bundle=@root.pem'", r, err, r.o.Mount)
	}
	if err := chain.Check(r.o.Now()); err != nil {
		return nil, fmt.Errorf("%s: %w, or configure another issuer", r, err)
	}
	return chain, nil
}

// sign has Vault sign the certificate that a request asks for. It is one that fits: nothing holds Vault itself to a validity or a path length.
func (r *Root) sign(ctx context.Context, i *issuer, request ca.CertifyRequest) (*x509.Certificate, error) {
	now := r.o.Now()
	order := map[string]any{
		"csr":                  string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: request.CSR})),
		"common_name":          request.CommonName,
		"organization":         organization,
		"uri_sans":             "spiffe://" + request.TrustDomain,
		"exclude_cn_from_sans": true,
		"use_csr_values":       false,
		"max_path_length":      0,
		"format":               "pem",
		// Whole seconds, rounded so that the certificate begins no earlier than asked for; Vault takes 0 for its own default of 30.
		"not_before_duration": max(int64(now.Sub(request.NotBefore)/time.Second), 1),
	}
	if i.old {
		order["ttl"] = int64(request.NotAfter.Sub(now) / time.Second)
	} else {
		order["not_after"] = request.NotAfter.Format(time.RFC3339) // as a point in time it does not depend on Vault's clock
	}
	var answer struct {
		Data struct {
			Certificate string `json:"certificate"`
		} `json:"data"`
	}
	if err := r.o.Client.write(ctx, r.o.Client.o.Timeout, i.path, order, &answer); err != nil {
		return nil, err
	}
	cert, err := parseOne(answer.Data.Certificate)
	if err != nil {
		return nil, fmt.Errorf("what Vault gives as the certificate: %w", err)
	}
	return cert, nil
}

func parseOne(text string) (*x509.Certificate, error) {
	certs, err := pemfile.Certificates([]byte(text))
	if err != nil {
		return nil, err
	}
	if len(certs) != 1 {
		return nil, fmt.Errorf("it is %d certificates in PEM instead of one", len(certs))
	}
	return certs[0], nil
}
