// SPDX-License-Identifier: Apache-2.0

//go:build !amd64

package compare

var hasSIMD = false

func sumSIMD([]byte, []uint64, []uint64) (d0, d1 uint64, done int) { return 0, 0, 0 }
