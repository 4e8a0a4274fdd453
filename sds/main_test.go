package sds_test

import (
	"testing"

	"github.com/signet-mesh/signet/integration/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }
