// Package source brings policies, and the keys of tokens that they name, from where
// they are kept to where decisions are made, and never lets half a change through.
//
// # Folder
//
// A [Folder] is a directory of YAML files. All files directly in it whose names
// end in .yaml or .yml and do not begin with a dot are policies; folders below it
// are not looked into. What was read becomes one [authz.Snapshot], swapped whole.
//
// A file that is being written cannot be told from one that is complete by
// looking at it, so the folder looks at how it came:
//
//   - At start the files are complete; that is the contract with whoever starts
//     the program. The same holds for a folder that takes the place of the old one
//     by a rename, or by a change of the symbolic link that the path goes through.
//   - Later a file counts when it was renamed into place, and a removal counts.
//     Several within a few milliseconds make one snapshot.
//   - Kubelet's volumes of ConfigMaps, and others of that form (links to
//     ..data/FILE, where ..data is itself a link), count as a whole when ..data
//     is swapped.
//   - Anything else is a write in place: appending, truncating and writing, cp onto
//     the name or to a new one, creating a link. It is reported, as an
//     [authz.Problem] with the remedy, in the log and by a metric, and the file's
//     last contents that counted go on. Written back to those, it is as if nothing
//     had happened.
//
// "mv FILE .t && mv .t FILE" makes a write in place count. sed -i, rsync, install
// scripts and editors that save by renaming need nothing; vim and cp write in
// place. Hard links and links to elsewhere count when they are renamed into place;
// what later happens behind a link to elsewhere is a write in place.
//
// How a file came is known exactly, from the kernel's inotify events, which tell
// a rename (IN_MOVED_TO) from a creation; a size, a time or an inode number could
// not: freed inode numbers are used again at once. If events were lost, and
// every few seconds to be safe, everything is compared with what was read; a
// difference that no event explains is a write in place too. So the folder must
// be on a file system of this machine: a network file system's changes by others
// make no events.
//
// A file that counts and cannot be read (no permission, too large, not a regular
// file, a dangling link) keeps the resources that came from it, and denies if there
// are none; [authz.Set.Update] has the rules, resource by resource. FIFOs and
// devices are never opened.
//
// A folder that is gone, cannot be listed, has lost the ..data that its links
// refer to, exceeds a limit, or was created anew instead of renamed into place, is
// an error, not "no policies": the last snapshot stays, [Folder.Ready] says why,
// and a metric its age. A folder that is deleted file by file, slowly, is a series
// of removals; within the 50 ms that removals wait, it is a folder that is gone.
//
// # Cluster
//
// A [Cluster] is the resources of three types, as a Kubernetes API server has them:
// AuthorizationPolicy, PeerAuthentication and RequestAuthentication of
// security.istio.io/v1. Each is listed once, consistently, and then watched; nothing
// else is read. Resources come to [authz.Parse] as the API server sends them, so a
// field of a newer CRD is seen and refused, not lost.
//
// "Nothing there" and "not known" are different things:
//
//   - Nothing counts before all three types were listed completely. Until then the
//     policies that a predecessor saved ([Cluster.Export]) are in force, and without
//     them every check is denied.
//   - An API server that is away, refuses, or does not serve a type is an error:
//     the last policies stay, [Cluster.Ready] says why, and a metric since when.
//   - A resource that is missing is only let go when the API server says that its
//     type is served and resources of it could be created. When a CRD is deleted, its
//     resources are deleted first, one by one; they stay in force here, because
//     nobody decided that what they close is to be open. When the CRD is back, what
//     the cluster says counts again, and the old resources are gone if nobody has
//     applied them anew. So removals take 100 ms longer than other changes.
//   - A bad edit leaves the resource's last good version, also across a restart.
//
// # Key sets
//
// [KeySets] are the keys by which tokens are verified, where a RequestAuthentication
// names them by jwksUri, or names only an issuer, whose OpenID configuration says
// where they are. Only what rules of this node's pods want is fetched: over TLS,
// from public addresses, and from others where the configuration allows them. The
// address is checked when it is connected to, so that neither a redirect nor a name
// that resolves to something else leads elsewhere; no proxy is used. Answers are
// bounded in size and time, sets in number, for each namespace too, and fetches that go
// on at once: servers that do not answer hold up nobody but the namespaces that name
// them.
//
// A set is fetched again every twenty minutes, and when a token has the ID of a key
// that is not in it (every ten seconds at most, every minute if that finds nothing
// new). An answer that cannot be had or used changes nothing: the last
// good keys stay for as long as it takes, over a restart too, and metrics say how
// old they are. A set that never could be fetched has no keys, so that every token
// that needs it is refused.
//
// # Trust
//
// An attacker who can write a RequestAuthentication can have its node's agent send
// GET requests with TLS to public addresses of his choice, a few a minute, and learns
// no more of the answers than whether tokens verify. An attacker who can stand in
// for the server that a jwksUri names makes tokens for those who trust it.
//
// An attacker who can write policies in the cluster decides, for the namespaces in
// which Kubernetes lets him; in the root namespace, for all. One who can stand in
// for the API server decides everything. One who can cut the agent off from it can
// freeze the policies, visibly. One who can write the saved policies, which only
// root can, decides until the cluster answers.
//
// An attacker who can write to the folder decides who may call whom on this node.
// One who can only write to the files in it, but not create names, can at most
// have the writes reported, until the next start: then files are complete by
// contract. One who controls the contents of one file that others rename into
// place can add one more DENY or ALLOW for any workload: nothing here knows for
// which namespaces a file may speak. That is up to whoever fills the folder.
// One who can make the folder disappear can freeze the policies, visibly.
package source
