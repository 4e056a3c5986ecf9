//go:build e2e

package vault_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"kedge/test/process"
	"kedge/test/vault"
)

func TestMain(m *testing.M) { os.Exit(process.Main(m)) }

// initialise runs 'kedge init' in a folder, with the login of the fixture; what is given later counts.
func (f *fixture) initialise(t *testing.T, dir, out string, set map[string]string, args ...string) (said string, err error) {
	t.Helper()
	all := map[string]string{"vault.address": f.Address, "vault.caFile": f.CAFile, "vault.login.method": "approle", "vault.login.roleID": f.roleID, "vault.login.secretID": f.secretFile,
		"csr.listen": "127.0.0.1:0", "operations.listen": "127.0.0.1:0"}
	for key, value := range set {
		all[key] = value
	}
	args = append([]string{"init", "--out", out}, args...)
	for key, value := range all {
		if value != "" {
			args = append(args, "--set", key+"="+value)
		}
	}
	command := exec.CommandContext(t.Context(), process.Binary(), args...)
	command.Dir = dir
	text, err := command.CombinedOutput()
	f.holdsNoSecret(t, string(text))
	return string(text), err
}

// TestInitSaysWhatIsWrongWithVault: nothing is written then.
func TestInitSaysWhatIsWrongWithVault(t *testing.T) {
	eachServer(t, func(t *testing.T, f *fixture) {
		pki, transit := f.mountRoot(t), f.mountTransit(t)
		dir := t.TempDir()
		file := func(name, text string) string {
			path := filepath.Join(dir, name)
			process.Write(t, path, text)
			return path
		}
		token := map[string]string{"vault.login.method": "token", "vault.login.roleID": "", "vault.login.secretID": "", "vault.login.token": file("token", "hvs.nobodys-token\n")}
		for name, wrong := range map[string]struct {
			set  map[string]string
			says []string
			own  bool // the root is of Kedge's own making
		}{
			"the address":             {set: map[string]string{"vault.address": "https://127.0.0.1:1"}, says: []string{"https://127.0.0.1:1", "cannot be reached", "See that it runs"}},
			"its CA":                  {set: map[string]string{"vault.caFile": ""}, says: []string{"certificate is not trusted"}},
			"the token":               {set: token, says: []string{"403", "token"}},
			"the secret id":           {set: map[string]string{"vault.login.secretID": file("secret", "00000000-0000-0000-0000-000000000000\n")}, says: []string{"the login by AppRole at auth/approle/login"}},
			"the mount of PKI":        {set: map[string]string{"root.vault.mount": "nowhere"}, says: []string{"nowhere/issuer/default"}},
			"the issuer":              {set: map[string]string{"root.vault.issuer": "nobody"}, says: []string{"nobody"}},
			"the mount of keys":       {set: map[string]string{"issuingCA.vault.mount": "nowhere"}, says: []string{"nowhere/keys/kedge-"}},
			"the mount of keys alone": {set: map[string]string{"issuingCA.vault.mount": "nowhere"}, says: []string{"nowhere/keys/kedge-"}, own: true},
			"the prefix of keys":      {set: map[string]string{"issuingCA.vault.prefix": "other-"}, says: []string{"give the policy of Kedge's token", "other-"}},
			"the file of its CA":      {set: map[string]string{"vault.caFile": file("empty", "")}, says: []string{"vault.caFile", "no certificate in PEM"}},
			"the secret's file":       {set: map[string]string{"vault.login.secretID": filepath.Join(dir, "none")}, says: []string{filepath.Join(dir, "none"), "no such file"}},
			"an address in clear":     {set: map[string]string{"vault.address": "http://vault.example:8200"}, says: []string{"http://"}},
		} {
			t.Run(name, func(t *testing.T) {
				root, set := "vault", map[string]string{"root.vault.mount": pki, "issuingCA.vault.mount": transit}
				if wrong.own {
					root, set = "file", map[string]string{"issuingCA.vault.mount": transit}
				}
				for key, value := range wrong.set {
					set[key] = value
				}
				said, err := f.initialise(t, dir, "wrong.yaml", set, "--root", root, "--keys", "vault")
				if err == nil {
					t.Fatalf("it is taken for good:\n%s", said)
				}
				for _, want := range append(wrong.says, "nothing is written") {
					if !strings.Contains(said, want) {
						t.Errorf("it does not say %q:\n%s", want, said)
					}
				}
				if _, err := os.Stat(filepath.Join(dir, "wrong.yaml")); err == nil {
					t.Error("a configuration is written")
				}
			})
		}
	})
}

// TestACAInVaultIsInitialisedBackedUpAndRestored, with the root there, the keys, or both. A backup holds no key that is in Vault. The CA that is restored goes on under the same root.
func TestACAInVaultIsInitialisedBackedUpAndRestored(t *testing.T) {
	eachServer(t, func(t *testing.T, f *fixture) {
		for name, in := range map[string]struct {
			root, keys string
			files      int // in the backup
			clear      int // keys
		}{"root": {"vault", "file", 4, 1}, "keys": {"file", "vault", 5, 1}, "root and keys": {"vault", "vault", 3, 0}} {
			t.Run(name, func(t *testing.T) {
				k, set := process.New(t, ""), map[string]string{}
				k.Config = filepath.Join(k.Dir, "vault.yaml")
				if in.root == "vault" {
					set["root.vault.mount"] = f.mountIntermediate(t)
				}
				if in.keys == "vault" {
					set["issuingCA.vault.mount"] = f.mountTransit(t)
				}
				if said, err := f.initialise(t, k.Dir, "vault.yaml", set, "--root", in.root, "--keys", in.keys, "--data", k.Data); err != nil {
					t.Fatalf("kedge init: %v\n%s", err, said)
				}
				if in.keys == "vault" {
					if text, refused := f.Refuses(t, "LIST", f.transit+"/keys"); !refused {
						t.Errorf("the check left a key behind: %s", text)
					}
				}
				if said := k.Must(t, "config", "check"); !strings.Contains(said, "is good") {
					t.Errorf("the configuration is as init wrote it, and not good: %s", said)
				}
				k.Start(t)
				fetch := func(args ...string) {
					t.Helper()
					k.Must(t, append([]string{"svid", "fetch", "--out", filepath.Join(k.Dir, "svid")}, args...)...)
				}
				k.Must(t, "token", "create", "--identity", "ns/default/sa/web", "--out", filepath.Join(k.Dir, "token"))
				fetch("--token-file", filepath.Join(k.Dir, "token"))
				root := process.Read(t, filepath.Join(k.Dir, "svid", "root-cert.pem"))
				saved := filepath.Join(k.Dir, "backup.tar")
				if said := k.Must(t, "backup", "--out", saved); !strings.Contains(said, fmt.Sprintf("%d, of which %d keys are not encrypted", in.files, in.clear)) {
					t.Errorf("the backup has other files:\n%s", said)
				}
				k.Stop(t)

				k.Data = filepath.Join(k.Dir, "restored")
				k.Must(t, "restore", "--from", saved, "--data", k.Data)
				process.Write(t, k.Config, strings.Replace(process.Read(t, k.Config), filepath.Join(k.Dir, "kedge-data"), k.Data, -1))
				k.Start(t)
				k.Ready(t, process.Patience)
				fetch("--renew")
				if got := process.Read(t, filepath.Join(k.Dir, "svid", "root-cert.pem")); got != root {
					t.Errorf("the restored CA has another root:\n%s", got)
				}
				authorities := k.Must(t, "authority", "list")
				for _, want := range map[bool][]string{true: {" foreign until ", " retired ", " since ", " complete"}, false: {" retired ", " since ", " complete"}}[in.root == "vault"] {
					if !strings.Contains(authorities, want) {
						t.Errorf("the authorities lack %q:\n%s", want, authorities)
					}
				}
				k.Must(t, "ledger", "verify")
				k.Must(t, "doctor")
				k.Stop(t)
				f.holdsNoSecret(t, k.Log())
			})
		}
	})
}

// TestTheCommandsOfTheGuideWorkAsPrinted runs every command of docs/vault.md, in their order, with OpenBao's program in the place of Vault's, and serves what comes of it.
func TestTheCommandsOfTheGuideWorkAsPrinted(t *testing.T) {
	page := process.Read(t, "../../docs/vault.md")
	var commands, policy string
	for _, block := range regexp.MustCompile("(?s)```(sh|hcl)\n(.*?)```").FindAllStringSubmatch(page, -1) {
		if block[1] == "sh" {
			commands += block[2]
		} else {
			policy += block[2]
		}
	}
	if strings.Count(commands, "vault ") < 8 || !strings.Contains(commands, "kedge init ") {
		t.Fatalf("the page has only these commands: are they still found?\n%s", commands)
	}
	server := vault.Start(t, vault.OpenBao)
	k := process.New(t, "")
	k.Config = filepath.Join(k.Dir, "guide.yaml")
	process.Write(t, filepath.Join(k.Dir, "kedge.hcl"), policy)
	process.Write(t, filepath.Join(k.Dir, "vault-ca.pem"), process.Read(t, server.CAFile))
	bin := t.TempDir()
	for name, program := range map[string]string{"vault": os.Getenv("BAO_BIN"), "kedge": process.Binary()} {
		if err := os.Symlink(program, filepath.Join(bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	commands = strings.ReplaceAll(strings.ReplaceAll(commands, "https://vault.example:8200", server.Address), "kedge.yaml", k.Config)
	commands = strings.Replace(commands, "kedge init ", "kedge init --out "+k.Config+" ", 1)
	shell := exec.CommandContext(t.Context(), "sh", "-eux", "-c", commands)
	shell.Dir, shell.Env = k.Dir, append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "HOME="+k.Dir, "BAO_ADDR="+server.Address, "BAO_TOKEN="+server.Root, "BAO_CACERT="+server.CAFile)
	if said, err := shell.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, said)
	}
	process.Write(t, k.Config, process.Read(t, k.Config)+process.Ports)
	k.Start(t)
	k.Ready(t, process.Patience)
	k.Must(t, "token", "create", "--identity", "ns/default/sa/web", "--out", filepath.Join(k.Dir, "join"))
	k.Must(t, "svid", "fetch", "--token-file", filepath.Join(k.Dir, "join"), "--out", filepath.Join(k.Dir, "svid"))
}

// TestTheDemoWithARootInVaultLeavesNothingBehind runs 'make demo ROOT=vault'.
func TestTheDemoWithARootInVaultLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	process.Demo(t, "../demo.sh", "vault", "An OpenBao server with a root in its PKI engine", "checked against the real server", "CN=Demo Root", " foreign until ")
}
