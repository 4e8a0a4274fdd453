package demo

import (
	"fmt"
	"path/filepath"
	"strings"
)

// Files of D/policies.
const (
	meshFile   = "mesh.yaml"
	serverFile = "server.yaml"
	denyFile   = "no-admin.yaml"
)

// What the demo asks for. Each path of a GET is there for one thing.
const (
	helloPath   = "/hello"   // open to everybody
	ordersPath  = "/orders"  // open to the client only
	adminPath   = "/admin"   // closed by a DENY policy
	reportsPath = "/reports" // closed by the edit
)

// denyPolicy is the policy that closes /admin.
const denyPolicy = "default/no-admin"

func meshPolicy(mode string) string {
	return fmt.Sprintf(`# The whole mesh: may peers speak plaintext (PERMISSIVE) or not (STRICT)?
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: default
  namespace: istio-system
spec:
  mtls:
    mode: %s
`, mode)
}

func serverPolicy() string {
	return fmt.Sprintf(`# The server: the client may GET anything, everybody may GET %[1]s.
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: server
  namespace: default
spec:
  selector:
    matchLabels:
      app: %[2]s
  action: ALLOW
  rules:
    - from:
        - source:
            principals: [%[3]s/ns/%[4]s/sa/%[5]s]
      to:
        - operation:
            methods: [GET]
    - to:
        - operation:
            methods: [GET]
            paths: [%[1]s]
`, helloPath, serverPod.app, trustDomain, clientPod.namespace, clientPod.serviceAccount)
}

// closing is the DENY policy that closes paths of the workloads that have a label.
func closing(app string, paths ...string) string {
	return fmt.Sprintf(`# The server: nobody may use %s.
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: no-admin
  namespace: default
spec:
  selector:
    matchLabels:
      app: %s
  action: DENY
  rules:
    - to:
        - operation:
            paths: [%s]
`, strings.Join(paths, " and "), app, strings.Join(paths, ", "))
}

// basePolicies are what the demo begins with, by file.
func basePolicies() map[string]string {
	return map[string]string{
		meshFile:   meshPolicy("PERMISSIVE"),
		serverFile: serverPolicy(),
		denyFile:   closing(serverPod.app, adminPath),
	}
}

// setPolicy renames a new version of a policy file into place.
func (s *stage) setPolicy(file, content string) error {
	if err := replaceFile(s.dir, filepath.Join(s.dir, "policies", file), content); err != nil {
		return fmt.Errorf("changing the policy file %s: %w", file, err)
	}
	return nil
}
