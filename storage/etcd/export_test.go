package etcd

import "google.golang.org/grpc"

// Intercept has every request of a store go through f.
func (o *Options) Intercept(f grpc.UnaryClientInterceptor) {
	o.dial = append(o.dial, grpc.WithChainUnaryInterceptor(f))
}
