package identity

// Waiting is how many channels p keeps for those who wait.
func (p *Pods) Waiting() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := len(p.changed)
	if p.first != nil {
		n++
	}
	return n
}
