package demo

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
)

// stay says how to try everything by hand and waits until ctx ends. The error is
// why it ended.
func (s *stage) stay(ctx context.Context, stdout io.Writer) error {
	err := s.waitProxies(ctx)
	if err == nil {
		_, err = io.WriteString(stdout, s.instructions())
	}
	if err == nil {
		err = replaceFile(s.dir, filepath.Join(s.dir, "ready"), s.addressLines())
	}
	if err == nil {
		<-ctx.Done()
		err = context.Cause(ctx)
	}
	return err
}

// addressLines are the addresses for scripts, one "name: value" a line.
func (s *stage) addressLines() string {
	return fmt.Sprintf(`server: https://%s
client: http://%s
server-admin: http://%s
client-admin: http://%s
ca: %s
ca-metrics: http://%s/metrics
agent-metrics: http://%s/metrics
`, s.at.server, s.at.client, s.at.serverAdmin, s.at.clientAdmin, s.at.ca, s.at.caHTTP, s.at.agentHTTP)
}

func (s *stage) instructions() string {
	return fmt.Sprintf(`Everything runs until Ctrl-C; the files are in %[1]s.

%[2]s
The client's proxy makes mutual TLS of plaintext; the server sees who it is:
  curl -i http://%[3]s%[4]s
  curl -i http://%[3]s%[5]s      # 403
  tail -1 %[1]s/logs/server.access.log    # which policy, and why

The server's proxy takes plaintext as long as the mesh is PERMISSIVE, and mutual
TLS with an SVID of the trust domain only:
  curl -i http://%[6]s%[4]s
  curl -ik https://%[6]s%[4]s     # refused: no certificate
  sed -i s/PERMISSIVE/STRICT/ %[1]s/policies/mesh.yaml
  curl -i http://%[6]s%[4]s       # 403
Policies count when they are renamed into place, as sed -i does.

SVIDs live %[7]s and are renewed at half of that; watch the serial change:
  curl -s http://%[8]s/certs

A token as the client's pod has one (here it is replaced every %[9]s):
  %[10]s dev token --dir %[1]s/issuer --audience %[11]s --namespace %[12]s \
    --service-account %[13]s --pod %[14]s --pod-uid %[15]s --node %[16]s --node-uid %[17]s

Kill a daemon and this command ends and says so.

`, s.dir, s.addressLines(), s.at.client, helloPath, adminPath, s.at.server, svidTTL, s.at.clientAdmin, rotateAfter,
		s.programs.signet, clientPod.audience, clientPod.namespace, clientPod.serviceAccount, clientPod.name, clientPod.uid, clientPod.node, clientPod.nodeUID)
}
