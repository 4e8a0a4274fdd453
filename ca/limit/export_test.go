package limit

import "google.golang.org/grpc/credentials"

// Waiting is how many items wait, in any line.
func (q *Queue) Waiting() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.items[Urgent] + q.items[InTime]
}

// OpenConnections is how many connections count as open.
func OpenConnections(c credentials.TransportCredentials) int {
	d := c.(guarded).connections
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.open
}
