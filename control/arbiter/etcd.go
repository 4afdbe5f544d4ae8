// SPDX-License-Identifier: Apache-2.0

package arbiter

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/lockstep-ft/lockstep/control/config"
)

// etcd keeps the entry in one key. Each write is a transaction on the key's revision,
// so that of several in flight at most one is applied, and none that was sent before
// one which was.
type etcd struct {
	client    *clientv3.Client
	key       string
	endpoints []string
	timeout   time.Duration

	noBump bool // mutation, set by tests: Settle only reads
}

func openEtcd(vm, node string, a *config.Arbiter) (*etcd, error) {
	cfg := clientv3.Config{
		DialTimeout: a.Timeout,
		// Without keep-alive a request waits for a member that went silent.
		DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: 2 * time.Second,
		Logger: zap.NewNop(), // errors are returned
	}
	scheme := "http://"
	if a.TLS != nil {
		t, err := clientTLS(a.TLS.On(node))
		if err != nil {
			return nil, fmt.Errorf("arbiter etcd: %w", err)
		}
		cfg.TLS, scheme = t, "https://"
	}
	for _, e := range a.Endpoints {
		cfg.Endpoints = append(cfg.Endpoints, scheme+e)
	}
	client, err := clientv3.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("arbiter etcd: %w", err)
	}
	return &etcd{client: client, key: "lockstep/" + vm, endpoints: a.Endpoints, timeout: a.Timeout}, nil
}

// clientTLS reads the client's certificate anew at each connection, so that a
// renewal needs no restart.
func clientTLS(f config.TLSFiles) (*tls.Config, error) {
	pem, err := os.ReadFile(f.CA)
	if err != nil {
		return nil, fmt.Errorf("read the CA: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", f.CA)
	}
	t := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	if f.Cert == "" {
		return t, nil
	}
	load := func() (*tls.Certificate, error) {
		c, err := tls.LoadX509KeyPair(f.Cert, f.Key)
		if err != nil {
			return nil, fmt.Errorf("client certificate %s: %w", f.Cert, err)
		}
		return &c, nil
	}
	if _, err := load(); err != nil {
		return nil, err
	}
	t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	return t, nil
}

func (e *etcd) Close() error { return e.client.Close() }

func (e *etcd) Read(ctx context.Context) (now Entry, err error) {
	err = e.try(ctx, "read", func(ctx context.Context) error {
		now, _, err = e.get(ctx)
		return err
	})
	return now, err
}

func (e *etcd) Swap(ctx context.Context, old, next Entry) (now Entry, swapped bool, err error) {
	if err := checkSwap(old, next); err != nil {
		return Entry{}, false, err
	}
	err = e.try(ctx, "change", func(ctx context.Context) error {
		for {
			var rev int64
			if now, rev, err = e.get(ctx); err != nil || now != old {
				return err
			}
			// If the other host's Settle came first, it changed the revision only: again.
			if _, now, err = e.put(ctx, rev, next); err != nil || now != old {
				return err
			}
		}
	})
	if err == nil {
		err = checkNow(old, now)
	}
	// An earlier try may have succeeded and its reply been lost, so the entry decides.
	return now, err == nil && now == next, err
}

// Settle writes the entry again, which gives the key a new revision. A transaction that
// was sent before names an older one, and fails.
func (e *etcd) Settle(ctx context.Context) (now Entry, err error) {
	if e.noBump {
		return e.Read(ctx)
	}
	err = e.try(ctx, "settle", func(ctx context.Context) error {
		for {
			var rev int64
			if now, rev, err = e.get(ctx); err != nil {
				return err
			}
			var done bool
			if done, now, err = e.put(ctx, rev, now); done || err != nil {
				return err
			}
		}
	})
	return now, err
}

// try repeats ask once for each member, each with its share of the timeout: the client
// goes round the members, and one may be unreachable without an error. Repeating is
// safe, since of several transactions on one revision only one is applied.
func (e *etcd) try(ctx context.Context, what string, ask func(context.Context) error) error {
	ctx, done := context.WithTimeout(ctx, e.timeout)
	defer done()
	var err error
	for range e.endpoints {
		once, done := context.WithTimeout(ctx, e.timeout/time.Duration(len(e.endpoints)))
		err = ask(once)
		done()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil || errors.Is(err, errContent) {
			break
		}
	}
	if errors.Is(err, context.DeadlineExceeded) { // the client does not report what it was waiting for
		err = fmt.Errorf("no answer in time: it is down or out of reach, or arbiter.tls does not fit it: %w", err)
	}
	return fmt.Errorf("arbiter etcd (%s): %s %s: %w", strings.Join(e.endpoints, ", "), what, e.key, err)
}

var errContent = errors.New("another program writes there, or another version of lockstep")

// get is a linearizable read. The revision is 0 where the key does not exist.
func (e *etcd) get(ctx context.Context) (Entry, int64, error) {
	resp, err := e.client.Get(ctx, e.key)
	if err != nil {
		return Entry{}, 0, err
	}
	return e.found((*clientv3.GetResponse)(resp))
}

func (e *etcd) found(resp *clientv3.GetResponse) (Entry, int64, error) {
	if len(resp.Kvs) == 0 {
		return Entry{}, 0, nil
	}
	kv := resp.Kvs[0]
	r, err := decode(kv.Value)
	if err != nil {
		return Entry{}, 0, fmt.Errorf("%w; %w", err, errContent)
	}
	return r, kv.ModRevision, nil
}

// put writes r if the key still has the revision, and returns the entry in force then.
func (e *etcd) put(ctx context.Context, rev int64, r Entry) (done bool, now Entry, err error) {
	resp, err := e.client.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(e.key), "=", rev)).
		Then(clientv3.OpPut(e.key, string(r.encode()))).
		Else(clientv3.OpGet(e.key)).
		Commit()
	if err != nil {
		return false, Entry{}, err
	}
	if resp.Succeeded {
		return true, r, nil
	}
	if len(resp.Responses) != 1 || resp.Responses[0].GetResponseRange() == nil {
		return false, Entry{}, errors.New("the answer to the transaction lacks the key")
	}
	now, _, err = e.found((*clientv3.GetResponse)(resp.Responses[0].GetResponseRange()))
	return false, now, err
}
