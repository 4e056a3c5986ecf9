package config

import (
	"fmt"
	"io/fs"
	"reflect"
	"regexp"
	"strconv"
	"time"

	"kedge/issuer/agent"
	"kedge/issuer/istio"
)

// DefaultAgent is what 'kedge agent' does where its file says nothing.
func DefaultAgent() *Agent {
	return &Agent{KeyType: istio.KeyTypes[0], ConsumerGrace: Duration(time.Minute), Log: Default().Log}
}

// DefaultAgentWorkload is what a workload has where the file says nothing.
func DefaultAgentWorkload() AgentWorkload {
	return AgentWorkload{Name: "workload", Files: AgentFiles{Mode: "0600", RereadAfter: Duration(time.Minute)}}
}

// DefaultAgentSocket is what a socket has where the file says nothing.
func DefaultAgentSocket() AgentSocket { return AgentSocket{Mode: "0600", MaxConnections: 64} }

// LoadAgent reads the file of 'kedge agent' at path. The error is an *Error, with everything that is wrong with the file's form, when it could be read; call Validate for
// whether the values make sense.
func LoadAgent(path string) (*Agent, error) {
	text, folder, err := read(path)
	if err != nil {
		return nil, err
	}
	a := DefaultAgent()
	if _, err := decode(text, path, a); err != nil {
		return nil, err
	}
	resolvePaths(reflect.ValueOf(a).Elem(), "", folder)
	return a, nil
}

// workloadName is what is fit for a file's name and for a label.
var workloadName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// What limits an agent.
const (
	maxWorkloads   = 200
	maxConnections = 10_000 // of a socket
	maxGrace       = time.Hour
)

// Validate says whether the values make sense, each by itself and together. It reads no file. The error is an *Error with everything that is wrong.
func (a *Agent) Validate() error {
	v := validation{}
	if v.required("server", a.Server, "the CA's HOST:PORT"); a.Server != "" {
		v.address("server", a.Server)
	}
	v.required("rootFile", a.RootFile, "the PEM file of the roots that the CA's server proves itself under")
	v.oneOf("keyType", a.KeyType, istio.KeyTypes...)
	if a.TTL != 0 {
		v.seconds("ttl", a.TTL)
	}
	v.grace("consumerGrace", a.ConsumerGrace)
	if a.Operations.Listen != "" {
		v.address("operations.listen", a.Operations.Listen)
	}
	v.log(a.Log)
	if len(a.Workloads) == 0 || len(a.Workloads) > maxWorkloads {
		v.refuse("workloads", "there are %d: 1 to %d may be", len(a.Workloads), maxWorkloads)
	}
	names, paths := map[string]bool{}, map[string]bool{}
	once := func(path, text string) {
		if paths[text] {
			v.refuse(path, "%q is there twice", shorten(text))
		}
		paths[text] = true
	}
	for n, w := range a.Workloads {
		path := fmt.Sprintf("workloads[%d]", n)
		switch {
		case !workloadName.MatchString(w.Name):
			v.refuse(path+".name", `%q is not a name of a-z, 0-9 and "-", of at most 63 letters`, shorten(w.Name))
		case names[w.Name]:
			v.refuse(path+".name", "there are two of the name %q: give each workload its own", w.Name)
		}
		names[w.Name] = true
		if (w.TokenFile == "") == (w.ClientCertificate == "") {
			v.refuse(path, "one of tokenFile and clientCertificate says whose the identity is: give one of them")
		}
		if len(w.Sockets) == 0 && w.Files.Dir == "" {
			v.refuse(path, "it has neither sockets nor files.dir: nobody would get the SVID")
		}
		for m, s := range w.Sockets {
			path := fmt.Sprintf("%s.sockets[%d]", path, m)
			v.required(path+".path", s.Path, "the path of a unix socket")
			if err := agent.CheckSocketPath(s.Path); err != nil {
				v.refuse(path+".path", "%v", err)
			}
			once(path+".path", s.Path)
			v.mode(path+".mode", s.Mode)
			if s.MaxConnections < 1 || s.MaxConnections > maxConnections {
				v.refuse(path+".maxConnections", "%d is not 1 to %d", s.MaxConnections, maxConnections)
			}
		}
		if w.Files.Dir != "" {
			once(path+".files.dir", w.Files.Dir)
			if w.Files.Dir == w.ClientCertificate {
				v.refuse(path+".files.dir", "it is the folder of the clientCertificate, which would be replaced: name another folder")
			}
		}
		v.mode(path+".files.mode", w.Files.Mode)
		if mode, err := ParseMode(w.Files.Mode); err == nil && mode&0o022 != 0 {
			v.refuse(path+".files.mode", "%q lets others write the key and the roots that programs trust: they may read, as with \"0640\"", w.Files.Mode)
		}
		v.grace(path+".files.rereadAfter", w.Files.RereadAfter)
	}
	if len(v.problems) > 0 {
		return &Error{Problems: v.problems}
	}
	return nil
}

func (v *validation) grace(path string, d Duration) {
	if d.Std() > maxGrace {
		v.refuse(path, "%s is more than %s: the CA would wait as long for every new trust bundle", d, Duration(maxGrace))
	}
}

func (v *validation) mode(path, text string) {
	if mode, err := ParseMode(text); err != nil {
		v.refuse(path, "%v", err)
	} else if mode&0o111 != 0 || mode&0o600 == 0 {
		v.refuse(path, `%q is not a mode of reading and writing, like "0600" or "0660"`, text)
	}
}

// ParseMode reads a mode in octal, like "0660".
func ParseMode(text string) (fs.FileMode, error) {
	mode, err := strconv.ParseUint(text, 8, 9)
	if err != nil {
		return 0, fmt.Errorf(`%q is not a mode in octal, like "0660"`, shorten(text))
	}
	return fs.FileMode(mode), nil
}
