// Package leaktest fails a package whose tests leave goroutines behind.
//
// # Trust
//
// It is linked into tests only.
package leaktest

import (
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/signet-mesh/signet/integration/process"
)

// Main is for TestMain: it runs the tests and ends the program. Goroutines that are about
// to end when the last test has, such as those of connections that were closed, have
// time for it on a busy machine.
func Main(m *testing.M) { goleak.VerifyTestMain(patient{m}) }

type patient struct{ m *testing.M }

func (p patient) Run() int {
	code := p.m.Run()
	for end := time.Now().Add(process.Patience); code == 0 && goleak.Find() != nil && time.Now().Before(end); {
		time.Sleep(100 * time.Millisecond)
	}
	return code
}
