// Command server is the real core of Vault 1.13.1 behind its real HTTP API: what 'vault server' is without its command line, its user interface and
// the hundred plugins that no test needs. It keeps its storage in a folder, so that it can be stopped and started again.
//
//	server -listen 127.0.0.1:8200 -data DIR -cert server.pem -key server-key.pem
//
// It starts sealed; 'PUT /v1/sys/init' and 'PUT /v1/sys/unseal' do as they do with any Vault.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	kubernetes "github.com/hashicorp/vault-plugin-auth-kubernetes"
	"github.com/hashicorp/vault/builtin/credential/approle"
	"github.com/hashicorp/vault/builtin/credential/cert"
	"github.com/hashicorp/vault/builtin/logical/pki"
	"github.com/hashicorp/vault/builtin/logical/transit"
	vaulthttp "github.com/hashicorp/vault/http"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/physical/file"
	"github.com/hashicorp/vault/vault"
)

var (
	engines = map[string]logical.Factory{"pki": pki.Factory, "transit": transit.Factory}
	logins  = map[string]logical.Factory{"approle": approle.Factory, "cert": cert.Factory, "kubernetes": kubernetes.Factory}
)

func main() {
	listen := flag.String("listen", "", "address")
	data := flag.String("data", "", "folder of the storage")
	certFile := flag.String("cert", "", "certificate chain in PEM")
	keyFile := flag.String("key", "", "key in PEM")
	flag.Parse()
	if err := run(*listen, *data, *certFile, *keyFile); err != nil {
		fmt.Fprintln(os.Stderr, "server:", err)
		os.Exit(1)
	}
}

func run(listen, data, certFile, keyFile string) error {
	logger := hclog.New(&hclog.LoggerOptions{Level: hclog.Info, Output: os.Stderr})
	storage, err := file.NewFileBackend(map[string]string{"path": data}, logger)
	if err != nil {
		return err
	}
	backends := map[string]logical.Factory{}
	for name, factory := range engines {
		backends[name] = factory
	}
	core, err := vault.NewCore(&vault.CoreConfig{
		Physical: storage, DisableMlock: true, LogicalBackends: backends, CredentialBackends: logins, BuiltinRegistry: registry{}, Logger: logger,
	})
	if err != nil {
		return err
	}
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return err
	}
	inner, err := net.Listen("tcp", listen)
	if err != nil {
		return err
	}
	// As the listener of 'vault server' does: a client certificate is asked for, and judged by the auth method.
	listener := tls.NewListener(inner, &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS12,
		NextProtos: []string{"h2", "http/1.1"}})
	server := &http.Server{Handler: vaulthttp.Handler.Handler(&vault.HandlerProperties{Core: core}), ReadHeaderTimeout: 10 * time.Second}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	context.AfterFunc(ctx, func() {
		server.Close()
		core.Shutdown()
	})
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// registry tells the core which plugins are compiled in: without one a mount panics.
type registry struct{}

func (registry) Contains(name string, kind consts.PluginType) bool {
	_, found := registry{}.Get(name, kind)
	return found
}

func (registry) Get(name string, kind consts.PluginType) (func() (interface{}, error), bool) {
	factory, found := all(kind)[name]
	return func() (interface{}, error) { return factory, nil }, found
}

func (registry) Keys(kind consts.PluginType) []string {
	var names []string
	for name := range all(kind) {
		names = append(names, name)
	}
	return names
}

func (registry) DeprecationStatus(string, consts.PluginType) (consts.DeprecationStatus, bool) {
	return consts.Supported, true
}

func all(kind consts.PluginType) map[string]logical.Factory {
	switch kind {
	case consts.PluginTypeSecrets:
		return engines
	case consts.PluginTypeCredential:
		return logins
	}
	return nil
}
