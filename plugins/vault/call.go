package vault

import (
	"bytes"
	"context"
	"encoding/json"
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

// The lengths to which a refusal of Vault is shown, in octets and in lines.
const (
	maxReason  = 300
	maxReasons = 5
)

// refusal is an answer of Vault that is no success.
type refusal struct {
	status  int      // of HTTP
	reasons []string // as Vault gives them; none for something that is not there
}

func (r *refusal) Error() string {
	if len(r.reasons) == 0 {
		return fmt.Sprintf("it answered %d %s", r.status, http.StatusText(r.status))
	}
	return fmt.Sprintf("it answered %d %s: %s", r.status, http.StatusText(r.status), strings.Join(r.reasons, "; "))
}

func (r *refusal) says(text string) bool {
	return strings.Contains(strings.ToLower(strings.Join(r.reasons, "\n")), text)
}

// refused returns the refusal in err, or nil.
func refused(err error) *refusal {
	var r *refusal
	errors.As(err, &r)
	return r
}

// isDenied says that the token is no longer good, or may not do this.
func isDenied(err error) bool { r := refused(err); return r != nil && r.status == http.StatusForbidden }

// isAbsent says that what was asked for is not there, while the engine that it would be in is.
func isAbsent(err error) bool {
	r := refused(err)
	return r != nil && r.status == http.StatusNotFound && len(r.reasons) == 0
}

// isBusy says that it is not about the call: Vault is sealed, has no active node, or has a quota.
func (r *refusal) isBusy() bool {
	return r.status == http.StatusServiceUnavailable || r.status == http.StatusTooManyRequests
}

// isMountGone says that nothing is mounted where the path leads.
func isMountGone(r *refusal) bool {
	return r.says("no handler for route") || r.says("route entry not found")
}

// unanswered is a failure of the transport: no answer came.
type unanswered struct{ error }

func (u unanswered) Unwrap() error { return u.error }

// send makes one call and decodes the answer into into, which may be nil. The error is not explained yet.
func (c *connection) send(ctx context.Context, method, path string, body, into any) error {
	var response *api.Response
	var err error
	switch method {
	case http.MethodGet:
		response, err = c.api.Logical().ReadRawWithContext(ctx, path)
	case http.MethodPut:
		var text []byte
		if text, err = json.Marshal(body); err != nil {
			return fmt.Errorf("encoding a request to Vault: %w", err)
		}
		response, err = c.api.Logical().WriteRawWithContext(ctx, path, text)
	case http.MethodDelete:
		response, err = c.api.Logical().DeleteRawWithContext(ctx, path)
	}
	if response != nil && response.Body != nil {
		defer response.Body.Close()
	}
	if err != nil {
		return c.plain(err)
	}
	if into == nil {
		return nil
	}
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return fmt.Errorf("reading its answer: %w", err)
	}
	if err := json.NewDecoder(bytes.NewReader(text)).Decode(into); err != nil {
		return fmt.Errorf("its answer is not the JSON that was expected: %w", err)
	}
	return nil
}

// plain makes a refusal of what the library says on several lines. A server that is well never repeats a secret that it was sent; should one do so, it is
// taken out.
func (c *connection) plain(err error) error {
	var answer *api.ResponseError
	if !errors.As(err, &answer) {
		var wrapped *url.Error // its text has the method and the whole URL, which the explanation names better
		if errors.As(err, &wrapped) {
			err = unanswered{wrapped.Err}
		}
		if text := c.scrub(err.Error()); text != err.Error() {
			return errors.New(text)
		}
		return err
	}
	r := &refusal{status: answer.StatusCode}
	for _, reason := range answer.Errors {
		reason = c.scrub(strings.Join(strings.FieldsFunc(reason, func(r rune) bool { return r <= ' ' || r == 0x7f }), " "))
		if len(reason) > maxReason {
			reason = strings.ToValidUTF8(reason[:maxReason], "") + "…"
		}
		if reason != "" && len(r.reasons) < maxReasons {
			r.reasons = append(r.reasons, reason)
		}
	}
	return r
}

// scrub takes secrets out of a text.
func (c *connection) scrub(text string) string {
	for _, secret := range c.secrets {
		if secret != "" {
			text = strings.ReplaceAll(text, secret, "(a secret)")
		}
	}
	return text
}

// explain says what failed, on what, and what to do about it.
func (c *Client) explain(err error, limit time.Duration, method, path string) error {
	if err == nil {
		return nil
	}
	if advice := c.advice(err, limit, method, path); advice != "" {
		return fmt.Errorf("%s of %s at the Vault %s: %w: %s", verbs[method], path, c.o.Address, err, advice)
	}
	return fmt.Errorf("%s of %s at the Vault %s: %w", verbs[method], path, c.o.Address, err)
}

var verbs = map[string]string{http.MethodGet: "the reading", http.MethodPut: "the writing", http.MethodDelete: "the deletion"}

// capabilities are what Vault's policies call the methods.
var capabilities = map[string]string{http.MethodGet: "read", http.MethodPut: "update", http.MethodDelete: "delete"}

func (c *Client) advice(err error, limit time.Duration, method, path string) string {
	var network *net.OpError
	var handshake net.Error
	var transport unanswered
	switch r := refused(err); {
	case r == nil && errors.Is(err, context.Canceled):
		return ""
	case r == nil && errors.Is(err, context.DeadlineExceeded):
		return fmt.Sprintf("it did not answer within %s. Look at its load and at the network", limit)
	case r == nil && isTrust(err):
		return fmt.Sprintf("its certificate is not trusted under %s. Put the CA that issued it there, or name the server as its certificate does", c.o.trustedBy())
	case r == nil && !errors.As(err, &network) && errors.As(err, &handshake) && handshake.Timeout():
		return fmt.Sprintf("it did not answer within %s. Look at its load and at the network", c.o.Timeout)
	case r == nil && (errors.As(err, &network) || errors.As(err, &transport)):
		return "it cannot be reached. See that it runs, and that the address and the network are right"
	case r == nil:
		return ""
	case r.says("vault is sealed"):
		return "unseal it with 'vault operator unseal'"
	case r.status == http.StatusServiceUnavailable:
		return "it is sealed, not initialized, or has no active node: look at 'vault status'"
	case isMountGone(r):
		return "nothing is mounted there" + c.o.inNamespace() + ". Mount the engine (docs/vault.md), or configure where it is"
	case r.status == http.StatusForbidden:
		return fmt.Sprintf("give the policy of Kedge's token %q on %q%s (docs/vault.md)", capabilities[method], path, c.o.inNamespace())
	case r.status == http.StatusTooManyRequests:
		return "a quota of Vault's is used up: raise it for Kedge"
	}
	return ""
}

func (o ClientOptions) trustedBy() string {
	if o.CAFile != "" {
		return o.CAFile
	}
	return "the system's roots, since no CA file is configured"
}

func (o ClientOptions) inNamespace() string {
	if o.Namespace != "" {
		return " in the namespace " + o.Namespace
	}
	return ""
}
