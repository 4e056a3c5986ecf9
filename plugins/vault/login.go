package vault

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"regexp"
	"strings"
	"time"
)

// Login is how Kedge proves itself to Vault: exactly one of its methods. All that is secret is read from its file anew for each login.
type Login struct {
	Token       *Secret           // a token that somebody else makes, such as an agent of Vault's. It is renewed while it can be
	AppRole     *AppRoleLogin     //
	Kubernetes  *KubernetesLogin  //
	Certificate *CertificateLogin //
}

// AppRoleLogin logs in with the auth method approle.
type AppRoleLogin struct {
	Mount    string // of the auth method; default "approle"
	RoleID   string // names the role; no secret
	SecretID Secret // must allow any number of uses (secret_id_num_uses=0)
}

// KubernetesLogin logs in with the token of the pod's service account.
type KubernetesLogin struct {
	Mount     string // of the auth method; default "kubernetes"
	Role      string // of the auth method
	TokenFile string // default /var/run/secrets/kubernetes.io/serviceaccount/token
}

// CertificateLogin logs in with the client certificate of the TLS connection.
type CertificateLogin struct {
	Mount    string // of the auth method; default "cert"
	Role     string // the name of a certificate in the auth method; empty: Vault tries all
	CertFile string // PEM, with what stands between the certificate and its root
	KeyFile  string // PEM; others may not read or write it
}

const serviceAccountToken = "/var/run/secrets/kubernetes.io/serviceaccount/token"

var mountPath = regexp.MustCompile(`^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$`)

// checkMount allows what may stand in the path of a call, and returns it without the slash at its end that Vault writes. None is byDefault.
func checkMount(what, mount, byDefault string) (string, error) {
	if mount == "" {
		mount = byDefault
	}
	mount = strings.TrimSuffix(mount, "/")
	if !mountPath.MatchString(mount) || !fs.ValidPath(mount) || len(mount) > 256 { // ValidPath takes no . and no ..
		return "", fmt.Errorf("the mount %.80q of %s is no path: write it as 'vault secrets list' and 'vault auth list' do, such as %q", mount, what, byDefault)
	}
	return mount, nil
}

// complete fills in the defaults, and says what is missing or wrong.
func (l Login) complete() (Login, error) {
	methods := 0
	for _, configured := range []bool{l.Token != nil, l.AppRole != nil, l.Kubernetes != nil, l.Certificate != nil} {
		if configured {
			methods++
		}
	}
	if methods != 1 {
		return l, fmt.Errorf("%d methods of logging in to Vault are configured: configure one of token, AppRole, Kubernetes and certificate", methods)
	}
	var err error
	switch {
	case l.Token != nil:
		if err := l.Token.check(); err != nil {
			return l, fmt.Errorf("the token for Vault: %w", err)
		}
	case l.AppRole != nil:
		m := *l.AppRole
		l.AppRole = &m
		if m.RoleID == "" {
			return l, errors.New("the AppRole for Vault has no role id: 'vault read auth/approle/role/NAME/role-id' says it")
		}
		if err := m.SecretID.check(); err != nil {
			return l, fmt.Errorf("the secret id of the AppRole for Vault: %w", err)
		}
		l.AppRole.Mount, err = checkMount("the auth method AppRole", m.Mount, "approle")
	case l.Kubernetes != nil:
		m := *l.Kubernetes
		l.Kubernetes = &m
		if m.Role == "" {
			return l, errors.New("the Kubernetes login for Vault has no role: name the one that the auth method has for Kedge's service account")
		}
		if m.TokenFile == "" {
			l.Kubernetes.TokenFile = serviceAccountToken
		}
		l.Kubernetes.Mount, err = checkMount("the auth method Kubernetes", m.Mount, "kubernetes")
	case l.Certificate != nil:
		m := *l.Certificate
		l.Certificate = &m
		if m.CertFile == "" || m.KeyFile == "" {
			return l, errors.New("the certificate login for Vault needs both a certificate file and a key file")
		}
		l.Certificate.Mount, err = checkMount("the auth method cert", m.Mount, "cert")
	}
	return l, err
}

// String names the method for logs.
func (l Login) String() string {
	switch {
	case l.Token != nil:
		return "token"
	case l.AppRole != nil:
		return "AppRole"
	case l.Kubernetes != nil:
		return "Kubernetes"
	}
	return "certificate"
}

// grant is what a token is good for.
type grant struct {
	token     string
	ttl       time.Duration // 0: it never ends
	renewable bool
}

// authentication is Vault's answer to a login and to a renewal.
type authentication struct {
	Auth *struct {
		ClientToken   string          `json:"client_token"`
		LeaseDuration int64           `json:"lease_duration"` // seconds
		Renewable     bool            `json:"renewable"`
		MFA           *map[string]any `json:"mfa_requirement"`
	} `json:"auth"`
}

func (a authentication) grant() (grant, error) {
	switch {
	case a.Auth != nil && a.Auth.MFA != nil && a.Auth.ClientToken == "":
		return grant{}, errors.New("it wants a second factor: exempt Kedge's role from it")
	case a.Auth == nil || a.Auth.ClientToken == "":
		return grant{}, errors.New("its answer has no token")
	}
	return grant{a.Auth.ClientToken, time.Duration(a.Auth.LeaseDuration) * time.Second, a.Auth.Renewable}, nil
}

// logIn gets a token by the configured method.
func (c *Client) logIn(ctx context.Context) (grant, error) {
	var route, secret string
	var body map[string]string
	var err error
	switch l := c.o.Login; {
	case l.Token != nil:
		if secret, err = l.Token.read(); err != nil {
			return grant{}, fmt.Errorf("the token for Vault: %w", err)
		}
		return c.lookUp(ctx, secret)
	case l.AppRole != nil:
		if secret, err = l.AppRole.SecretID.read(); err != nil {
			return grant{}, fmt.Errorf("the secret id for Vault: %w", err)
		}
		route, body = l.AppRole.Mount, map[string]string{"role_id": l.AppRole.RoleID, "secret_id": secret}
	case l.Kubernetes != nil:
		text, err := readFile(l.Kubernetes.TokenFile, 0) // Kubernetes gives it the mode 0644
		if err != nil {
			return grant{}, fmt.Errorf("the service account's token: %w", err)
		}
		if secret, err = oneLine(Secret{File: l.Kubernetes.TokenFile}, string(text)); err != nil {
			return grant{}, fmt.Errorf("the service account's token: %w", err)
		}
		route, body = l.Kubernetes.Mount, map[string]string{"role": l.Kubernetes.Role, "jwt": secret}
	case l.Certificate != nil:
		route, body = l.Certificate.Mount, map[string]string{}
		if l.Certificate.Role != "" {
			body["name"] = l.Certificate.Role
		}
	}
	route = "auth/" + route + "/login"
	connection, err := c.o.connect("")
	if err != nil {
		return grant{}, err
	}
	defer connection.close()
	connection.secrets = append(connection.secrets, secret)
	ctx, cancel := context.WithTimeout(ctx, c.o.Timeout)
	defer cancel()
	var answer authentication
	if err := connection.send(ctx, http.MethodPut, route, body, &answer); err != nil {
		if isProofRefused(err) {
			return grant{}, fmt.Errorf("the login by %s at %s of the Vault %s%s: %w: %s", c.o.Login, route, c.o.Address, c.o.inNamespace(), err, c.o.Login.mend())
		}
		return grant{}, c.explain(err, c.o.Timeout, http.MethodPut, route)
	}
	g, err := answer.grant()
	if err != nil {
		return grant{}, fmt.Errorf("the login by %s at %s of the Vault %s: %w", c.o.Login, route, c.o.Address, err)
	}
	return g, nil
}

// isProofRefused says that Vault knows the auth method, and does not take what proves Kedge to be somebody. Some versions answer 500 to a wrong secret id.
func isProofRefused(err error) bool {
	r := refused(err)
	return r != nil && !isMountGone(r) && (r.status == http.StatusBadRequest || r.status == http.StatusForbidden || r.says("invalid secret id") || r.says("invalid role"))
}

// mend says what to do when a login is refused.
func (l Login) mend() string {
	if l.AppRole != nil {
		return fmt.Sprintf("put a good secret id into %s, of the role with the id %s. The same one is tried again every %s only, since Vault locks a role with which too many logins fail "+
			"('vault read sys/locked-users' shows it), and at once when the file is written anew", l.AppRole.SecretID, l.AppRole.RoleID, lockout)
	}
	return "see that the role is right, and that what proves Kedge to be it is"
}

// lockout is more than the time for which Vault locks an AppRole after five logins that fail, and after which it forgets them: 15 min (user_lockout).
const lockout = 16 * time.Minute

// lookUp asks what a token is good for.
func (c *Client) lookUp(ctx context.Context, token string) (grant, error) {
	connection, err := c.o.connect(token)
	if err != nil {
		return grant{}, err
	}
	defer connection.close()
	return c.lookUpOver(ctx, connection, token)
}

func (c *Client) lookUpOver(ctx context.Context, connection *connection, token string) (grant, error) {
	const route = "auth/token/lookup-self"
	ctx, cancel := context.WithTimeout(ctx, c.o.Timeout)
	defer cancel()
	var answer struct {
		Data struct {
			TTL       int64 `json:"ttl"` // seconds
			Renewable bool  `json:"renewable"`
		} `json:"data"`
	}
	err := connection.send(ctx, http.MethodGet, route, nil, &answer)
	if isDenied(err) && c.o.Login.Token != nil {
		return grant{}, fmt.Errorf("the Vault %s does not take the token of %s any more, or never did, or its policies do not have 'default': %w: put a good one there",
			c.o.Address, c.o.Login.Token, err)
	}
	if err != nil {
		return grant{}, c.explain(err, c.o.Timeout, http.MethodGet, route)
	}
	return grant{token, time.Duration(answer.Data.TTL) * time.Second, answer.Data.Renewable}, nil
}
