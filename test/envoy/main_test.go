//go:build e2e

package envoy_test

import (
	"os"
	"testing"

	"kedge/test/process"
)

func TestMain(m *testing.M) { os.Exit(process.Main(m)) }
