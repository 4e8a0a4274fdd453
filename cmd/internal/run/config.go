package run

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"

	"go.yaml.in/yaml/v3"
)

// maxConfig bounds a configuration file; one with tens of thousands of static
// workloads is well below.
const maxConfig = 16 << 20

// unknownKey is how yaml.v3 reports a key that the struct does not have. The Go
// type in it says nothing to an operator. noDuration is how it reports a duration
// without a unit.
var (
	unknownKey = regexp.MustCompile(`field (\S+) not found in type \S+`)
	noDuration = regexp.MustCompile("cannot unmarshal \\S+ `([^`]*)` into time.Duration")
)

// LoadConfig reads the YAML file at path into the struct that config points to,
// which holds the defaults. It is strict: a key that the struct does not have, a
// key given twice, a second document and a value of the wrong type are errors
// that name the line.
func LoadConfig(path string, config any) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("reading configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return fmt.Errorf("reading configuration %s: %w", path, err)
	}
	if len(data) > maxConfig {
		return fmt.Errorf("reading configuration %s: the file is larger than %d bytes", path, maxConfig)
	}
	if err := decode(data, config); err != nil {
		return fmt.Errorf("reading configuration %s: %w", path, err)
	}
	return nil
}

func decode(data []byte, config any) error {
	d := yaml.NewDecoder(bytes.NewReader(data))
	d.KnownFields(true)
	err := d.Decode(config)
	if errors.Is(err, io.EOF) {
		return nil // an empty file is all defaults
	}
	if err != nil {
		text := unknownKey.ReplaceAllString(err.Error(), `unknown key "$1"`)
		return errors.New(noDuration.ReplaceAllString(text, `"$1" is not a duration; write it with a unit, such as 10s`))
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return errors.New("the file holds more than one YAML document; only one is read, so remove the others")
	}
	return nil
}

// PrintConfig writes the effective configuration as YAML.
func PrintConfig(w io.Writer, config any) error {
	e := yaml.NewEncoder(w)
	e.SetIndent(2)
	if err := e.Encode(config); err != nil {
		return fmt.Errorf("printing configuration: %w", err)
	}
	return e.Close()
}
