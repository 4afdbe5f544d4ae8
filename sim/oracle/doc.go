// SPDX-License-Identifier: Apache-2.0

// Package oracle compares lockstep with QEMU's own COLO proxy. The same packets go through
// colo-compare and filter-rewriter, in a QEMU without a guest, and through two lockstep
// daemons with their kernel programs; what leaves has to be what testdata says of each. Where the two
// differ, docs/DIFFERENCES.md says why.
package oracle
