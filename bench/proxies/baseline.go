// SPDX-License-Identifier: Apache-2.0

package proxies

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/lockstep-ft/lockstep/bench/lab"
)

//go:generate go run github.com/cilium/ebpf/cmd/bpf2go -cc clang-19 -strip llvm-strip-19 -go-package proxies -target bpfel -output-stem baseline baseline baseline.bpf.c -- -std=gnu11 -O2 -g -Wall -Werror -mcpu=v3 -idirafter /usr/include/x86_64-linux-gnu -idirafter /usr/include/aarch64-linux-gnu

// MirroringAlone is the floor: both guests work, nothing is held or compared.
func MirroringAlone(w *lab.World) (*Proxy, error) {
	// The client goes by the PVM's window. What does not fit into the SVM's is lost to it for good.
	if err := w.SVM.Sysctl("net/ipv4/tcp_rmem", "4096 67108864 67108864"); err != nil {
		return nil, err
	}
	var objs baselineObjects
	spec, err := loadBaseline()
	if err != nil {
		return nil, fmt.Errorf("read the baseline's programs: %w", err)
	}
	for name, at := range map[string]place{baselineVarPeerP: {w.HostP, "peerP"}, baselineVarTapS: {w.HostS, "tapS"}} {
		dev, err := at.ns.Device(at.device)
		if err != nil {
			return nil, err
		}
		if err := spec.Variables[name].Set(uint32(dev.Index)); err != nil {
			return nil, fmt.Errorf("set %s of the baseline's programs: %w", name, err)
		}
	}
	if err := spec.LoadAndAssign(&objs, nil); err != nil {
		return nil, fmt.Errorf("load the baseline's programs: %w", err)
	}
	closers := []func() error{objs.Close}
	p := &Proxy{Stop: func() error { return lab.Undo(closers) }}
	for _, a := range []struct {
		prog   *ebpf.Program
		ns     *lab.NS
		device string
		attach ebpf.AttachType
	}{
		{objs.BaseMirror, w.HostP, "tapP", ebpf.AttachTCXEgress},
		{objs.BasePriOut, w.HostP, "tapP", ebpf.AttachTCXIngress},
		{objs.BaseSecIn, w.HostS, "peerS", ebpf.AttachTCXIngress},
		{objs.BaseSecOut, w.HostS, "tapS", ebpf.AttachTCXIngress},
	} {
		err := a.ns.Do(func() error {
			dev, err := a.ns.Device(a.device)
			if err != nil {
				return err
			}
			l, err := link.AttachTCX(link.TCXOptions{Interface: dev.Index, Program: a.prog, Attach: a.attach})
			if err != nil {
				return fmt.Errorf("attach %s to %s: %w", a.prog, a.device, err)
			}
			closers = append(closers, l.Close)
			return nil
		})
		if err != nil {
			_ = p.Stop()
			return nil, err
		}
	}
	return p, nil
}
