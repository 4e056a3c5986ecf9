//go:build e2e

package vault_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kedge/test/process"
)

// mesh is a running CA that needs a server, and clients at work that ask for certificates.
type mesh struct {
	*process.Kedge
	cluster *process.Cluster

	served, refused atomic.Int64

	mu   sync.Mutex
	end  time.Time     // of the issuing CA that signed last
	left time.Duration // until then when the first client was refused
	odd  []string      // what a client cannot live with

	stop func()
}

// configuration is what the configuration of a CA says of the server, whose address may be another one on the way.
func (f *fixture) configuration(address string) string {
	return fmt.Sprintf("vault: {address: %q, caFile: %q, timeout: 3s, login: {method: approle, roleID: %q, secretID: %q}}\nlog: {level: debug}\n",
		address, f.CAFile, f.roleID, f.secretFile)
}

// startMesh starts a CA, and its clients. They stop when the test ends.
func (f *fixture) startMesh(t *testing.T, yaml string) *mesh {
	t.Helper()
	m := &mesh{Kedge: process.New(t, ""), cluster: process.NewCluster(t)}
	process.Write(t, m.Config, m.cluster.Configuration(t, m.Dir)+yaml)
	m.Start(t)
	m.work(t)
	t.Cleanup(func() { f.holdsNoSecret(t, m.Log()) })
	return m
}

// work sets clients to work, each of which asks some times in a second.
func (m *mesh) work(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var clients sync.WaitGroup
	for i := range 3 {
		caller, key, token := m.Dial(t, nil), process.NewKey(t), m.cluster.Token(t, "default", fmt.Sprintf("web-%d", i))
		clients.Go(func() {
			pace := time.NewTicker(100 * time.Millisecond)
			defer pace.Stop()
			for {
				m.ask(ctx, caller, key, token)
				select {
				case <-ctx.Done():
					return
				case <-pace.C:
				}
			}
		})
	}
	m.stop = sync.OnceFunc(func() {
		cancel()
		clients.Wait()
	})
	t.Cleanup(m.stop)
}

// rest ends the clients, and then the CA.
func (m *mesh) rest(t *testing.T) {
	t.Helper()
	m.stop()
	m.Stop(t)
}

// tryAgain is all that a client is told when the CA cannot sign.
var tryAgain = regexp.MustCompile(`^temporarily unavailable, try again; the CA's log says why \(request id [0-9a-f]{16}\)$`)

func (m *mesh) ask(ctx context.Context, caller *process.Caller, key process.Key, token string) {
	issued, err := caller.Issue(ctx, key.CSR, token, 0)
	m.mu.Lock()
	defer m.mu.Unlock()
	switch said := status.Convert(err); {
	case err == nil:
		m.end = issued.Chain[0].NotAfter
		if err := issued.VerifyAt(issued.Leaf.NotAfter); err != nil { // it outlives nothing
			m.odd = append(m.odd, err.Error())
		}
		m.served.Add(1)
	case ctx.Err() != nil: // this client gave up
	case said.Code() == codes.Unavailable && tryAgain.MatchString(said.Message()):
		if m.refused.Add(1) == 1 {
			m.left = time.Until(m.end)
		}
	default:
		m.odd = append(m.odd, err.Error())
	}
}

// goesOn waits until clients were served again.
func (m *mesh) goesOn(t *testing.T) {
	t.Helper()
	before := m.served.Load()
	process.Eventually(t, "clients to be served", func() error {
		if got := m.served.Load() - before; got < 10 {
			return fmt.Errorf("%d, and %d were refused", got, m.refused.Load())
		}
		return nil
	})
}

// renews waits until another issuing CA signs.
func (m *mesh) renews(t *testing.T) {
	t.Helper()
	before := m.signerEnds()
	process.Eventually(t, "a renewal", func() error {
		if end := m.signerEnds(); end.Equal(before) {
			return fmt.Errorf("the issuing CA that ends at %s still signs", end)
		}
		return nil
	})
}

// signerEnds is the end of the issuing CA that signed last.
func (m *mesh) signerEnds() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.end
}

// refuses waits until clients were refused.
func (m *mesh) refuses(t *testing.T) {
	t.Helper()
	before := m.refused.Load()
	process.Eventually(t, "clients to be refused", func() error {
		if m.refused.Load() == before {
			return fmt.Errorf("nobody was, %d were served", m.served.Load())
		}
		return nil
	})
}

// says waits until /readyz has that code and says each of these; nothing but "ready" when there are none. The metric and the doctor agree.
func (m *mesh) says(t *testing.T, code int, texts ...string) {
	t.Helper()
	process.Eventually(t, fmt.Sprintf("/readyz to say %d %q", code, texts), func() error {
		got, body := m.Get(t, "/readyz")
		if got != code || len(texts) == 0 && body != "ready\n" {
			return fmt.Errorf("%d %s", got, body)
		}
		for _, text := range texts {
			if !strings.Contains(body, text) {
				return fmt.Errorf("%d %s", got, body)
			}
		}
		return nil
	})
	process.Eventually(t, "the doctor to say so", func() error {
		r := m.Run(t, "doctor")
		for _, text := range texts {
			if !strings.Contains(r.Stdout, text) {
				return fmt.Errorf("%s", r.Stdout)
			}
		}
		if (r.Code == 0) != (len(texts) == 0) {
			return fmt.Errorf("exit code %d\n%s", r.Code, r.Stdout)
		}
		return nil
	})
}

func (m *mesh) problems(t *testing.T) float64 { return m.Metrics(t)["kedge_problems"] }

// check makes sure that clients were told nothing that they cannot live with, and that the ledger holds.
func (m *mesh) check(t *testing.T) {
	t.Helper()
	m.stop()
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, odd := range m.odd {
		if i == 5 {
			t.Errorf("… and %d more", len(m.odd)-i)
			break
		}
		t.Errorf("a client was told: %s", odd)
	}
	m.Must(t, "ledger", "verify")
}

// outage is something that befalls a server, and its end.
type outage struct {
	begin, end func(t *testing.T, f *fixture)
	says       string // why the root cannot certify
	keySays    string // why a key does not sign; "": the same
	keysGone   bool   // with the outage
	slow       bool   // the line was slow before
}

var outages = map[string]outage{
	"sealed": {
		begin: func(t *testing.T, f *fixture) { f.Seal(t) }, end: func(t *testing.T, f *fixture) { f.Unseal(t) }, says: "unseal it with 'vault operator unseal'"},
	"killed": {
		begin: func(_ *testing.T, f *fixture) { f.Stop() }, end: func(t *testing.T, f *fixture) { f.Restart(t) }, says: "it cannot be reached. See that it runs"},
	"frozen": {
		begin: func(t *testing.T, f *fixture) { f.Freeze(t) }, end: func(t *testing.T, f *fixture) { f.Thaw(t) }, says: "it did not answer within 3s", keySays: "it did not answer within "},
	"permission lost": {
		begin: func(t *testing.T, f *fixture) { f.writePolicy(t, "elsewhere", "elsewhere") }, end: func(t *testing.T, f *fixture) { f.writePolicy(t, f.pki, f.transit) },
		says: "give the policy of Kedge's token"},
	"mount gone": {
		begin: func(t *testing.T, f *fixture) {
			f.Delete(t, "sys/mounts/"+f.pki)
			f.Delete(t, "sys/mounts/"+f.transit)
		},
		end: func(t *testing.T, f *fixture) { // from a backup of the root; Transit has none of its keys
			f.mountPKI(t, f.pki)
			f.Write(t, f.pki+"/issuers/import/bundle", map[string]any{"pem_bundle": f.exported})
			f.Write(t, "sys/mounts/"+f.transit, map[string]any{"type": "transit"})
		}, says: "nothing is mounted there", keysGone: true},
	"slow, and then too slow": {
		begin: func(_ *testing.T, f *fixture) { f.line.delay.Store(int64(time.Hour)) }, end: func(_ *testing.T, f *fixture) { f.line.delay.Store(0) },
		says: "it did not answer within 3s", keySays: "it did not answer within ", slow: true},
}

// TestARunningCAOutlivesItsVault: two CAs have clients at work, one with its root in the server, and one with its keys there. Then the server is away. The one with the root there serves everybody
// until its issuing CA ends, and says when that is; the other tells everybody to try again. Both say what is wrong, and go on by themselves when the server is back.
func TestARunningCAOutlivesItsVault(t *testing.T) {
	for name, o := range outages {
		atOnce(t, name, func(t *testing.T, f *fixture) {
			f.exportRoot(t)
			f.mountTransit(t)
			f.line = f.startLine(t)
			root := f.startMesh(t, fmt.Sprintf("root: {kind: vault, vault: {mount: %q}}\n", f.pki)+f.configuration(f.line.address)+`
csr: {listen: "127.0.0.1:0", serverCertificateTTL: 5s}
operations: {listen: "127.0.0.1:0"}
issuingCA: {lifetime: 24s, keyStore: memory}
profiles: {default: {defaultTTL: 8s, maxTTL: 8s, minTTL: 1s, backdate: 0s}}
`)
			keys := f.startMesh(t, process.Ports+fmt.Sprintf("issuingCA: {keyStore: vault, vault: {mount: %q}}\n", f.transit)+f.configuration(f.line.address))
			for _, m := range []*mesh{root, keys} {
				m.goesOn(t)
				m.says(t, http.StatusOK)
			}
			if o.slow {
				f.line.delay.Store(int64(200 * time.Millisecond))
				keys.goesOn(t)
				root.renews(t)
				for _, m := range []*mesh{root, keys} {
					m.says(t, http.StatusOK)
					if n := m.refused.Load(); n > 0 {
						t.Errorf("%d calls were refused because the server is slow", n)
					}
				}
			}
			o.begin(t, f)
			t.Run("the root is there", func(t *testing.T) { root.outlivesRoot(t, o) })
			t.Run("the keys are there", func(t *testing.T) { keys.outlivesKeys(t, o) })
			o.end(t, f)
			for _, m := range []*mesh{root, keys} {
				m.goesOn(t)
				m.says(t, http.StatusOK)
				if n := m.problems(t); n != 0 {
					t.Errorf("kedge_problems is %v though all is well", n)
				}
				m.check(t)
			}
			if authorities := keys.Must(t, "authority", "list"); strings.Count(authorities, " issuing ") != map[bool]int{false: 1, true: 2}[o.keysGone] {
				t.Errorf("the CA whose keys are in the server has these authorities:\n%s", authorities)
			}
		})
	}
}

// outlivesRoot is what a CA does whose root is away: the issuing CA that there is serves everybody until its end.
func (m *mesh) outlivesRoot(t *testing.T, o outage) {
	m.says(t, http.StatusOK, "issuing CA: making a new issuing CA: having it certified by the root: ", o.says, ". The issuing CA that there is ends at ")
	if n := m.problems(t); n == 0 {
		t.Error("kedge_problems is 0")
	}
	m.refuses(t)
	m.mu.Lock()
	if m.left > 2*time.Second { // more than the minimum, and than a second that has begun
		t.Errorf("a client was refused %s before the issuing CA ended", m.left)
	}
	m.mu.Unlock()
	m.says(t, http.StatusServiceUnavailable, "that are left are less than the minimum of 1s", o.says)
	if log := m.Log(); !strings.Contains(log, `"about":"issuing CA","error":"making a new issuing CA: having it certified by the root: `) || !strings.Contains(log, o.says) {
		t.Error("the log does not say that the renewal failed")
	}
}

// outlivesKeys is what a CA does whose keys are away.
func (m *mesh) outlivesKeys(t *testing.T, o outage) {
	if o.keySays != "" {
		o.says = o.keySays
	}
	m.refuses(t)
	m.says(t, http.StatusServiceUnavailable, "does not sign: signing with the key kedge-", o.says)
	if n := m.problems(t); n == 0 {
		t.Error("kedge_problems is 0")
	}
	if !regexp.MustCompile(`"result":"unavailable","reason":"signing with the issuing CA \w+: .*` + regexp.QuoteMeta(o.says)).MatchString(m.Log()) {
		t.Error("the log does not say why calls were refused")
	}
}

// TestAnotherRootInThePlaceOfOneThatIsGone is nothing to begin a run with, since nobody in the mesh has it. With the old one as a further anchor it is trusted beside that, and everything goes on.
func TestAnotherRootInThePlaceOfOneThatIsGone(t *testing.T) {
	atOnce(t, "", func(t *testing.T, f *fixture) {
		m := f.startMesh(t, process.Ports+f.configuration(f.Address)+fmt.Sprintf("root: {kind: vault, vault: {mount: %q}}\n", f.mountRoot(t)))
		m.goesOn(t)
		signer := m.signerEnds()
		again := func() {
			t.Helper()
			m.Start(t)
			m.work(t)
			m.goesOn(t)
		}
		m.rest(t)
		f.Delete(t, "sys/mounts/"+f.pki)
		again() // while there is no root
		m.says(t, http.StatusOK, "root: nobody says now what is to be trusted", "nothing is mounted there", ". The issuing CA that there is ends at ")
		m.rest(t)
		f.mountPKI(t, f.pki)
		f.generateRoot(t, f.pki, "another root", 1)
		m.Launch(t)
		if code := m.Wait(t); code != 1 || !strings.Contains(m.Log(), "Put the root back that belongs to this data folder") || !strings.Contains(m.Log(), "root.anchorsFile") {
			t.Errorf("a start with another root ended with exit code %d:\n%s", code, m.Log())
		}
		anchors := filepath.Join(m.Dir, "anchors.pem")
		process.Write(t, anchors, read(t, filepath.Join(m.Data, "root-cert.pem")))
		process.Write(t, m.Config, strings.Replace(read(t, m.Config), "root: {kind: vault,", fmt.Sprintf("root: {kind: vault, anchorsFile: %q,", anchors), 1))
		again()
		m.says(t, http.StatusOK)
		if end := m.signerEnds(); !end.Equal(signer) {
			t.Errorf("an issuing CA signs that ends at %s, and not the one from before, which ends at %s", end, signer)
		}
		if said := m.Must(t, "authority", "list"); strings.Count(said, " root ") != 2 || strings.Count(said, " prepared ") != 1 {
			t.Errorf("the authorities are:\n%s", said)
		}
		m.check(t)
	})
}

// line is a way to the server, on which everything may be held up.
type line struct {
	address string
	delay   atomic.Int64 // of what goes by, in nanoseconds
}

// startLine makes one that is there until the test ends.
func (f *fixture) startLine(t *testing.T) *line {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &line{address: "https://" + listener.Addr().String()}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		_ = listener.Close() // it ends with the context anyway
		running.Wait()
	})
	running.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", strings.TrimPrefix(f.Address, "https://"))
			if err != nil { // the server is away
				_ = near.Close()
				continue
			}
			running.Go(func() {
				defer near.Close()
				defer far.Close()
				both, end := context.WithCancel(ctx)
				defer end()
				running.Go(func() {
					defer end()
					l.carry(both, near, far)
				})
				running.Go(func() {
					defer end()
					l.carry(both, far, near)
				})
				<-both.Done()
			})
		}
	})
	return l
}

// carry brings what from says to to, with the delay that there is when it comes by, until one of them is closed.
func (l *line) carry(ctx context.Context, to io.Writer, from io.Reader) {
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		if delay := time.Duration(l.delay.Load()); delay > 0 {
			select {
			case <-ctx.Done():
			case <-time.After(delay):
			}
		}
		if _, writeErr := to.Write(buffer[:n]); errors.Join(err, writeErr) != nil {
			return
		}
	}
}
