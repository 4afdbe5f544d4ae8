// SPDX-License-Identifier: Apache-2.0

// Package core is the user-space half of the data path without its system calls: ring
// records become events of package compare, its effects become frames, and a session
// becomes the programs' settings. Package loader gives it the kernel's memory and
// sockets; a model of the kernel can stand in for both.
package core
