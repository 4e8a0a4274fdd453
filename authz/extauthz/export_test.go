package extauthz

// MaxPeers is how many certificates a generation remembers.
const MaxPeers = maxPeers

// Peers is how many certificates s remembers.
func Peers(s *Server) int {
	s.peers.mu.RLock()
	defer s.peers.mu.RUnlock()
	return len(s.peers.young) + len(s.peers.old)
}
