package sds

// Encoded is how many SVIDs have an encoded form in memory.
func (s *Secrets) Encoded() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.encoded)
}
