// SPDX-License-Identifier: Apache-2.0

//go:build !(amd64 || arm64 || loong64 || mips64le || ppc64le || riscv64)

package bpf

// What Go and the kernel half share is laid out for 64-bit, little-endian hosts, and
// run on no others. On those this does not compile, and says why.
var _ = lockstep_needs_a_64_bit_little_endian_host
