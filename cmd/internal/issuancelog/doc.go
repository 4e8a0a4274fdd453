// Package issuancelog is the commands that read an authority's issuance log: list,
// export, verify and head. They are the same on a folder that lies still and on an
// authority that runs; a [Source] is what differs.
//
// The JSON of an entry and of a head is a format that others keep: fields are only
// ever added, and a golden file guards it.
//
// # Trust
//
// What is printed comes from the log and is escaped: a record cannot write to the
// operator's terminal. A head that is given to verify counts only with the signature
// of the log's key.
package issuancelog
