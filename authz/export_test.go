package authz

// ParseIPv4 is how an entry of X-Forwarded-For is read.
var ParseIPv4 = parseIPv4
