#!/usr/bin/env bash
# A standalone authority that serves Istio's certificate RPC, in the foreground:
#
#     run.sh [FOLDER [ADDRESS]]
#
# FOLDER (.run/istio-ca) gets everything: issuer/ makes service-account tokens
# (signet dev token --dir FOLDER/issuer …), data/ is the authority, and root.pem is
# there as soon as ADDRESS (127.0.0.1:15012) answers. Tokens for the audience
# istio-ca are good here for any namespace, account and pod on node-a, so never run
# this beside a cluster.
set -euo pipefail
dir=${1:-.run/istio-ca} address=${2:-127.0.0.1:15012}
mkdir -p "$dir/data"
chmod 700 "$dir" "$dir/data"
dir=$(cd "$dir" && pwd)
# Of an earlier run; nobody is to take it for the sign that this one answers.
rm -f "$dir/root.pem"
{
	signet dev issuer --dir "$dir/issuer" # prints the section tokens
	cat <<YAML
dataDir: "$dir/data"
listen: 127.0.0.1:0 # for Signet's agents, of which there are none here
adminSocket: "$dir/data/admin.sock"
publish:
  rootFile: "$dir/root.pem"
http:
  listen: ""
istio:
  listen: "$address"
  dnsNames: [istiod.istio-system.svc]
  anyPodOf: [node-a]
  renewalFor: ["*/*"]
  nodeAccounts: [istio-system/ztunnel]
# What ztunnel may ask for; every other pod of node-a asks for itself.
workloads:
- {namespace: default, serviceAccount: server, pod: server-0, podUID: 6f2b8a0e-0000-4000-8000-000000000001, node: node-a}
- {namespace: default, serviceAccount: client, pod: client-0, podUID: 6f2b8a0e-0000-4000-8000-000000000002, node: node-a}
YAML
} >"$dir/ca.yaml.new"
mv "$dir/ca.yaml.new" "$dir/ca.yaml"
exec signet-ca serve --config "$dir/ca.yaml"
