// SPDX-License-Identifier: Apache-2.0

package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lockstep-ft/lockstep/control/config"
	"github.com/lockstep-ft/lockstep/control/peerlink"
)

const (
	caCert = "ca.pem"
	caKey  = "ca.key"
	years  = 10 // that a certificate holds
)

func newKeys(e env) *cobra.Command {
	var file, dir string
	cmd := &cobra.Command{
		Use:   "keys -c pair.yaml -d DIR",
		Short: "Make the certificates that protect the control link and the two QEMUs",
		Long: "keys makes a CA and a certificate for each of the pair's nodes, and prints what goes\n" +
			"where. With a CA that is in DIR already it makes the certificates that are missing.\n" +
			"It overwrites nothing.",
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			switch {
			case file == "":
				return usageError{errors.New("which pair? Name its config file with -c")}
			case dir == "":
				return usageError{errors.New("where to? Name the certificates' folder with -d")}
			}
			c, err := loadConfig(e, file)
			if err != nil {
				return usageError{err}
			}
			return makeKeys(c, dir, e.stdout)
		},
	}
	cmd.Flags().StringVarP(&file, "config", "c", "", "the pair's config file")
	cmd.Flags().StringVarP(&dir, "dir", "d", "", "the folder to make them in")
	return cmd
}

// makeKeys makes what is missing in dir and prints to out what goes where.
func makeKeys(c *config.Config, dir string, out io.Writer) error {
	for _, n := range c.Nodes {
		if n.Name == "ca" {
			return c.Refuse("nodes.ca", "a node called ca would have the CA's files", "call it something else, or make certificates by other means")
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make certificates: %w", err)
	}
	ca, signer, err := loadCA(dir)
	if err != nil {
		return err
	}
	// All is looked at before anything is made.
	var missing []string
	for _, n := range c.Nodes {
		there, err := both(filepath.Join(dir, n.Name+".pem"), filepath.Join(dir, n.Name+".key"))
		switch {
		case err != nil:
			return err
		case there && ca == nil:
			return fmt.Errorf("make certificates: %s has a certificate of %s but no CA: put the %s and %s that made it there, or use another folder", dir, n.Name, caCert, caKey)
		case !there:
			missing = append(missing, n.Name)
		default:
			if err := usable(c, dir, n.Name); err != nil {
				return err
			}
		}
	}
	if len(missing) == 0 {
		return fmt.Errorf("make certificates: %s has those of %s already, and nothing is overwritten: remove a node's .pem and .key to renew them",
			dir, strings.ReplaceAll(c.Names(), `"`, ""))
	}
	if ca == nil {
		if ca, signer, err = makeCA(dir, c.VM); err != nil {
			return err
		}
		fmt.Fprintf(out, "made   %s\n", filepath.Join(dir, caCert))
		fmt.Fprintf(out, "made   %s\n", filepath.Join(dir, caKey))
	}
	for _, node := range missing {
		name := peerlink.CertName(node, c.VM)
		if err := issue(dir, node, &x509.Certificate{
			Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
			KeyUsage:    peerlink.KeyUsage,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		}, ca, signer); err != nil {
			return err
		}
		fmt.Fprintf(out, "made   %s\nmade   %s\n", filepath.Join(dir, node+".pem"), filepath.Join(dir, node+".key"))
	}
	// Printed only once the files are such as the daemons will accept.
	for _, n := range c.Nodes {
		if err := usable(c, dir, n.Name); err != nil {
			return err
		}
	}
	for _, n := range c.Nodes {
		_, cert, key := c.TLS.Files(n.Name)
		to := ""
		if cert != "" {
			to = fmt.Sprintf(", as %s, %s and %s", c.TLS.CA, cert, key)
		}
		fmt.Fprintf(out, "copy   %s, %s.pem and %s.key to the host of %s%s\n", caCert, n.Name, n.Name, n.Name, to)
	}
	_, err = fmt.Fprintf(out, "copy   %s nowhere: whoever has it can be any node; keep it off all hosts\n", caKey)
	return err
}

// usable finds out whether a node's daemon would start with what is in dir, and its peer
// take it.
func usable(c *config.Config, dir, node string) error {
	_, other, err := c.Node(node)
	if err != nil {
		return err
	}
	file := func(name string) string { return filepath.Join(dir, name) }
	files := peerlink.Certificates{CA: file(caCert), Cert: file(node + ".pem"), Key: file(node + ".key"), VM: c.VM, Node: node, Peer: other.Name}
	_, err = files.TLS()
	if err == nil && (c.TLS.QEMU || c.TLS.Insecure) { // they may be for a pair that is insecure so far
		err = files.CheckQEMU()
	}
	if err != nil {
		return fmt.Errorf("make certificates: those of %s in %s are of no use, and nothing is overwritten: remove %[1]s.pem and %[1]s.key: %[3]w", node, dir, err)
	}
	return nil
}

// both reports whether the two files of a pair exist. One alone is an error.
func both(cert, key string) (bool, error) {
	var there [2]bool
	for i, f := range []string{cert, key} {
		_, err := os.Lstat(f)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return false, fmt.Errorf("make certificates: %w", err)
		}
		there[i] = err == nil
	}
	if there[0] != there[1] {
		has, lacks := cert, key
		if there[1] {
			has, lacks = key, cert
		}
		return false, fmt.Errorf("make certificates: %s is there and %s is not, and nothing is overwritten: put it there, or remove the other", has, lacks)
	}
	return there[0], nil
}

// loadCA reads the CA in dir; nil when there is none.
func loadCA(dir string) (*x509.Certificate, crypto.Signer, error) {
	cert, key := filepath.Join(dir, caCert), filepath.Join(dir, caKey)
	if there, err := both(cert, key); err != nil || !there {
		return nil, nil, err
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, nil, fmt.Errorf("read the CA of %s: %w", dir, err)
	}
	ca, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		return nil, nil, fmt.Errorf("read the CA of %s: %w", dir, err)
	}
	signer, ok := pair.PrivateKey.(crypto.Signer)
	if !ok || !ca.IsCA {
		return nil, nil, fmt.Errorf("read the CA of %s: %s is no CA's certificate", dir, cert)
	}
	if now := time.Now(); now.After(ca.NotAfter) {
		return nil, nil, fmt.Errorf("read the CA of %s: it has ended on %s: make a new one in another folder", dir, ca.NotAfter.Format(time.DateOnly))
	}
	return ca, signer, nil
}

func makeCA(dir, vm string) (*x509.Certificate, crypto.Signer, error) {
	// Part of the name, so that a message about two CAs can tell them apart.
	made := time.Now().UTC().Format("2006-01-02 15:04:05")
	if err := issue(dir, "ca", &x509.Certificate{
		Subject: pkix.Name{CommonName: fmt.Sprintf("lockstep %s %s", vm, made)},
		IsCA:    true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil, nil); err != nil {
		return nil, nil, err
	}
	return loadCA(dir)
}

// issue makes NAME.pem and NAME.key in dir, signed by ca or, with nil, by itself.
func issue(dir, name string, template, ca *x509.Certificate, signer crypto.Signer) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make a key for %s: %w", name, err)
	}
	if ca == nil {
		ca, signer = template, key
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return fmt.Errorf("make a certificate for %s: %w", name, err)
	}
	now := time.Now()
	template.SerialNumber = serial.Add(serial, big.NewInt(1))
	template.NotBefore = now.Add(-time.Hour) // the other host's clock may be behind
	template.NotAfter = now.AddDate(years, 0, 0)
	der, err := x509.CreateCertificate(rand.Reader, template, ca, &key.PublicKey, signer)
	if err != nil {
		return fmt.Errorf("make a certificate for %s: %w", name, err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("make a key for %s: %w", name, err)
	}
	keyFile := filepath.Join(dir, name+".key")
	if err := writeNew(keyFile, 0o600, "PRIVATE KEY", secret); err != nil {
		return err
	}
	if err := writeNew(filepath.Join(dir, name+".pem"), 0o644, "CERTIFICATE", der); err != nil {
		return errors.Join(err, os.Remove(keyFile)) // one without the other is of no use
	}
	return nil
}

// writeNew makes a file that does not exist: all of it, or none.
func writeNew(file string, mode fs.FileMode, kind string, der []byte) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return fmt.Errorf("make certificates: %w", err)
	}
	err = errors.Join(pem.Encode(f, &pem.Block{Type: kind, Bytes: der}), f.Sync(), f.Close())
	if err != nil {
		return errors.Join(fmt.Errorf("make certificates: write %s: %w", file, err), os.Remove(file))
	}
	return nil
}
