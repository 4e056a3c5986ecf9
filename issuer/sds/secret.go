package sds

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// secretType is what this service is about.
const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// spiffeValidator is Envoy's extension that verifies a peer with the bundle of the peer's own trust domain.
const spiffeValidator = "envoy.tls.cert_validator.spiffe"

// bundleSecrets are all that can be made of some bundles, made once. They never change.
type bundleSecrets struct {
	of     []*Bundle
	digest string // of the numbers
	byName map[string]resource
}

// bundlesOf is what is made of a stream's bundles. Streams mostly share them.
func (s *Server) bundlesOf(m *Materials) *bundleSecrets {
	if made := s.bundles.Load(); made != nil && len(made.of) == len(m.Bundles) && (len(m.Bundles) == 0 || &made.of[0] == &m.Bundles[0]) {
		return made
	}
	made := newBundleSecrets(m.Bundles)
	s.bundles.Store(made)
	return made
}

func newBundleSecrets(bundles []*Bundle) *bundleSecrets {
	b := &bundleSecrets{of: bundles, byName: map[string]resource{}}
	if len(bundles) == 0 {
		return b
	}
	var numbers []string
	for _, bundle := range bundles {
		numbers = append(numbers, bundle.TrustDomain.Name(), NumberOf(bundle).String())
	}
	b.digest = digest(numbers...)
	own, number := bundles[0], NumberOf(bundles[0])
	id := "b-" + number.String()
	for _, bundle := range bundles[1:] {
		b.add(bundle.TrustDomain.IDString(), resource{id: "o-" + NumberOf(bundle).String()}, spiffeContext(bundle))
	}
	b.add(own.TrustDomain.IDString(), resource{id: id, bundle: own, number: number}, spiffeContext(own))
	b.add(NameBundle, resource{id: id, bundle: own, number: number}, &tls.CertificateValidationContext{TrustedCa: inline(own.PEM)})
	b.add(NameAllBundles, resource{id: id + "-" + b.digest, bundle: own, number: number}, spiffeContext(bundles...))
	return b
}

func (b *bundleSecrets) add(name string, r resource, context *tls.CertificateValidationContext) {
	var parts [2][]byte
	for i := range parts {
		part, err := renderPart(r.id, &tls.Secret{Name: name, Type: &tls.Secret_ValidationContext{ValidationContext: context}}, i == 1)
		if err != nil {
			r.render = func(bool) ([]byte, error) { return nil, err }
			b.byName[name] = r
			return
		}
		parts[i] = part
	}
	r.render = func(delta bool) ([]byte, error) {
		if delta {
			return parts[1], nil
		}
		return parts[0], nil
	}
	b.byName[name] = r
}

// spiffeContext makes Envoy verify a peer with the bundle of the peer's trust domain, as SPIRE's agent does, in the order of their names.
func spiffeContext(bundles ...*Bundle) *tls.CertificateValidationContext {
	config := &tls.SPIFFECertValidatorConfig{}
	for _, bundle := range bundles {
		config.TrustDomains = append(config.TrustDomains, &tls.SPIFFECertValidatorConfig_TrustDomain{Name: bundle.TrustDomain.Name(), TrustBundle: inline(bundle.PEM)})
	}
	slices.SortFunc(config.TrustDomains, func(a, b *tls.SPIFFECertValidatorConfig_TrustDomain) int { return strings.Compare(a.Name, b.Name) })
	typed, err := anypb.New(config)
	if err != nil { // a message of generated code can be marshalled
		panic(err)
	}
	return &tls.CertificateValidationContext{CustomValidatorConfig: &core.TypedExtensionConfig{Name: spiffeValidator, TypedConfig: typed}}
}

func inline(pem string) *core.DataSource {
	return &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: []byte(pem)}}
}

// renderSVID makes the part of a response that hands an SVID over, as Istio's agent and SPIRE's do.
func renderSVID(name string, svid *SVID, delta bool) ([]byte, error) {
	key, err := x509.MarshalPKCS8PrivateKey(svid.Key)
	if err != nil {
		return nil, fmt.Errorf("writing the private key of %s: %w", svid.ID, err)
	}
	var chain bytes.Buffer
	for _, certificate := range svid.Chain {
		_ = pem.Encode(&chain, &pem.Block{Type: "CERTIFICATE", Bytes: certificate.Raw}) // a bytes.Buffer takes everything
	}
	return renderPart(svidID(svid), &tls.Secret{Name: name, Type: &tls.Secret_TlsCertificate{TlsCertificate: &tls.TlsCertificate{
		CertificateChain: inline(chain.String()),
		PrivateKey:       inline(string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))),
	}}}, delta)
}

// renderPart marshals a response with one secret and nothing else: messages that are marshalled one after the other are one message, with the elements of all.
func renderPart(id string, secret *tls.Secret, delta bool) ([]byte, error) {
	packed, err := anypb.New(secret)
	if err != nil {
		return nil, fmt.Errorf("marshalling the secret %q: %w", secret.Name, err)
	}
	var response proto.Message = &discovery.DiscoveryResponse{Resources: []*anypb.Any{packed}}
	if delta {
		response = &discovery.DeltaDiscoveryResponse{Resources: []*discovery.Resource{{Name: secret.Name, Version: id, Resource: packed}}}
	}
	return proto.Marshal(response)
}
