package hsm

// ChildPID is the process that the module lives in now; 0: there is none.
func (t *Token) ChildPID() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.current == nil {
		return 0
	}
	return t.current.process.Process.Pid
}

// Protocol is what both sides must speak.
const Protocol = protocol

// KindDone is the kind of a frame that answers.
const KindDone = byte(kindDone)
