package kube

import (
	"fmt"

	"k8s.io/client-go/tools/cache"
)

// store hands on what a reflector reads of objects of one type.
type store[T any] struct {
	// put is told of each object that is there or has changed, and remove of each
	// that is gone.
	put, remove func(*T)
	// replace is told of all that there are.
	replace func([]*T)
	// strip is called for each object as it is read, before anything is kept: it
	// returns what is needed of it, so that a list of thousands is never held whole.
	// nil: all of it.
	strip func(*T) *T
}

var _ cache.TransformingStore = store[int]{}

func as[T any](obj any) (*T, error) {
	o, ok := obj.(*T)
	if !ok {
		return nil, fmt.Errorf("%T instead of %T", obj, o)
	}
	return o, nil
}

func (s store[T]) Add(obj any) error {
	o, err := as[T](obj)
	if err == nil {
		s.put(o)
	}
	return err
}

func (s store[T]) Update(obj any) error { return s.Add(obj) }

func (s store[T]) Delete(obj any) error {
	o, err := as[T](obj)
	if err == nil {
		s.remove(o)
	}
	return err
}

func (s store[T]) Replace(list []any, _ string) error {
	all := make([]*T, 0, len(list))
	for _, obj := range list {
		o, err := as[T](obj)
		if err != nil {
			return err
		}
		all = append(all, o)
	}
	s.replace(all)
	return nil
}

func (store[T]) Resync() error { return nil }

func (s store[T]) Transformer() cache.TransformFunc {
	if s.strip == nil {
		return nil
	}
	return func(obj any) (any, error) {
		if o, ok := obj.(*T); ok {
			return s.strip(o), nil
		}
		return obj, nil
	}
}
