package admin

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"syscall"

	"kedge/ca"
	"kedge/ca/ledger"
)

// What callers branch on, with errors.Is.
var (
	ErrNotRunning = errors.New("no CA is running there")    // nobody answers at the socket
	ErrInvalid    = errors.New("the CA cannot follow that") // the request itself is wrong; the error says only what is wrong with it
)

// invalid is an ErrInvalid with the CA's own text.
type invalid string

func (i invalid) Error() string { return string(i) }
func (i invalid) Unwrap() error { return ErrInvalid }

// Client talks to a running CA over its admin socket.
type Client struct {
	path string
	http *http.Client
}

// NewClient talks to the socket at path.
func NewClient(path string) *Client {
	dialer := func(ctx context.Context, _, _ string) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) { // no socket, or one that a killed CA left behind
			return nil, fmt.Errorf("%w: %w", ErrNotRunning, err)
		}
		return conn, err
	}
	return &Client{path: path, http: &http.Client{Transport: &http.Transport{DialContext: dialer}}}
}

// call sends request (nil: none) and reads the answer into answer.
func (c *Client) call(ctx context.Context, method, path string, request, answer any) error {
	response, err := c.send(ctx, method, path, request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if err := json.NewDecoder(response.Body).Decode(answer); err != nil {
		return fmt.Errorf("reading the CA's answer: %w", err)
	}
	return nil
}

func (c *Client) send(ctx context.Context, method, path string, request any) (*http.Response, error) {
	var body io.Reader
	if request != nil {
		raw, err := json.Marshal(request)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(raw)
	}
	call, err := http.NewRequestWithContext(ctx, method, "http://kedge"+path, body)
	if err != nil {
		return nil, err
	}
	response, err := c.http.Do(call)
	if err != nil {
		if errors.Is(err, ErrNotRunning) {
			return nil, fmt.Errorf("%w (admin socket %s): start it with 'kedge serve', or name its data folder with --data or --config", ErrNotRunning, c.path)
		}
		if errors.Is(err, fs.ErrPermission) {
			return nil, fmt.Errorf("this user may not use the admin socket %s: run the command as the CA's user or root: %w", c.path, err)
		}
		return nil, fmt.Errorf("talking to the CA over %s: %w", c.path, err)
	}
	if response.StatusCode == http.StatusOK {
		return response, nil
	}
	defer response.Body.Close()
	var failure Failure
	if err := json.NewDecoder(response.Body).Decode(&failure); err != nil || failure.Error == "" {
		return nil, fmt.Errorf("the CA answered %s", response.Status)
	}
	if response.StatusCode == http.StatusBadRequest {
		return nil, invalid(failure.Error)
	}
	return nil, errors.New(failure.Error)
}

// Status asks what the CA says of itself.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.call(ctx, http.MethodGet, "/v1/status", nil, &s)
}

// Bundle asks for the trust bundle.
func (c *Client) Bundle(ctx context.Context) (b Bundle, err error) {
	return b, c.call(ctx, http.MethodGet, "/v1/bundle", nil, &b)
}

// Get asks for a path and decodes the answer into answer.
func (c *Client) Get(ctx context.Context, path string, answer any) error {
	return c.call(ctx, http.MethodGet, path, nil, answer)
}

// Count asks how many events a filter finds.
func (c *Client) Count(ctx context.Context, f ledger.Filter) (uint64, error) {
	var answer struct{ Count uint64 }
	err := c.call(ctx, http.MethodGet, "/v1/ledger/count?"+query(f), nil, &answer)
	return answer.Count, err
}

// CreateToken asks for a join token.
func (c *Client) CreateToken(ctx context.Context, r TokenRequest) (t TokenResponse, err error) {
	return t, c.call(ctx, http.MethodPost, "/v1/tokens", r, &t)
}

// Revoke revokes a certificate, or its lineage from there on.
func (c *Client) Revoke(ctx context.Context, r RevokeRequest) (answer ca.Revocation, err error) {
	return answer, c.call(ctx, http.MethodPost, "/v1/revocations", r, &answer)
}

// ConfirmClock tells the CA that its machine's clock is right.
func (c *Client) ConfirmClock(ctx context.Context) (r Recorded, err error) {
	return r, c.call(ctx, http.MethodPost, "/v1/clock/confirm", nil, &r)
}

// Taint says that an issuing CA is compromised.
func (c *Client) Taint(ctx context.Context, r TaintRequest) (t Tainted, err error) {
	return t, c.call(ctx, http.MethodPost, "/v1/authorities/taint", r, &t)
}

// Backup asks for a backup, and gives it as it comes. It is whole only when backup.Read says so.
func (c *Client) Backup(ctx context.Context) (io.ReadCloser, error) {
	response, err := c.send(ctx, http.MethodPost, "/v1/backup", nil)
	if err != nil {
		return nil, err
	}
	return response.Body, nil
}

// SetLogLevel changes what the CA logs: debug, info, warn or error.
func (c *Client) SetLogLevel(ctx context.Context, level string) error {
	return c.call(ctx, http.MethodPut, "/v1/log-level", map[string]string{"level": level}, &struct{}{})
}

// Events streams what a filter finds, each event with the line that it came in.
func (c *Client) Events(ctx context.Context, f ledger.Filter) iter.Seq2[EventLine, error] {
	return func(yield func(EventLine, error) bool) {
		response, err := c.send(ctx, http.MethodGet, "/v1/ledger/events?"+query(f), nil)
		if err != nil {
			yield(EventLine{}, err)
			return
		}
		defer response.Body.Close()
		lines := bufio.NewScanner(response.Body)
		lines.Buffer(nil, 16<<20)
		for lines.Scan() {
			var line struct {
				Event
				Failure
				End bool `json:"end"`
			}
			if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
				yield(EventLine{}, fmt.Errorf("reading the CA's answer: %w", err))
				return
			}
			if line.End {
				return
			}
			if line.Error != "" {
				yield(EventLine{}, errors.New(line.Error))
				return
			}
			if !yield(EventLine{Event: line.Event, JSON: bytes.Clone(lines.Bytes())}, nil) {
				return
			}
		}
		err = lines.Err()
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		yield(EventLine{}, fmt.Errorf("the CA's answer broke off: %w", err))
	}
}

// EventLine is an event, parsed and as it came.
type EventLine struct {
	Event
	JSON []byte
}

// query writes a filter as the server's parseFilter reads it.
func query(f ledger.Filter) string {
	q := url.Values{}
	number := func(name string, n uint64) {
		if n > 0 {
			q.Set(name, strconv.FormatUint(n, 10))
		}
	}
	number("from", f.From)
	number("to", f.To)
	number("limit", uint64(max(f.Limit, 0)))
	if f.SPIFFEID != "" {
		q.Set("spiffe_id", f.SPIFFEID)
	}
	if len(f.Serial) > 0 {
		q.Set("serial", f.Serial.String())
	}
	if !f.Authority.IsZero() {
		q.Set("authority", f.Authority.String())
	}
	if f.Since != 0 {
		q.Set("since", f.Since.String())
	}
	if f.Until != 0 {
		q.Set("until", f.Until.String())
	}
	if f.Newest {
		q.Set("newest", "true")
	}
	for _, t := range f.Types {
		q.Add("type", t.String())
	}
	return q.Encode()
}
