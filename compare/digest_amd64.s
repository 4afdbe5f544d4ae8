// SPDX-License-Identifier: Apache-2.0

#include "textflag.h"

// func sumAVX2(b *byte, k0, k1 *uint64, n int) (d0, d1 uint64)
//
// Four words a round. A word times a key is, mod 2^64, its product with the key's lower half
// plus that with the upper half, shifted: VPMULUDQ multiplies the lower halves of its
// operands, and a load from 4 bytes further on has the keys' upper halves there.
TEXT ·sumAVX2(SB), NOSPLIT, $0-48
	MOVQ  b+0(FP), SI
	MOVQ  k0+8(FP), DI
	MOVQ  k1+16(FP), DX
	MOVQ  n+24(FP), CX
	VPXOR Y0, Y0, Y0   // lane 0: sum of the products with the lower halves
	VPXOR Y1, Y1, Y1   // and with the upper
	VPXOR Y2, Y2, Y2   // lane 1
	VPXOR Y3, Y3, Y3

round:
	VPMOVZXDQ (SI), Y4
	VPMULUDQ  (DI), Y4, Y5
	VPMULUDQ  4(DI), Y4, Y6
	VPMULUDQ  (DX), Y4, Y7
	VPMULUDQ  4(DX), Y4, Y8
	VPADDQ    Y5, Y0, Y0
	VPADDQ    Y6, Y1, Y1
	VPADDQ    Y7, Y2, Y2
	VPADDQ    Y8, Y3, Y3
	ADDQ      $16, SI
	ADDQ      $32, DI
	ADDQ      $32, DX
	DECQ      CX
	JNZ       round

	VPSLLQ       $32, Y1, Y1
	VPSLLQ       $32, Y3, Y3
	VPADDQ       Y1, Y0, Y0
	VPADDQ       Y3, Y2, Y2
	VEXTRACTI128 $1, Y0, X1
	VEXTRACTI128 $1, Y2, X3
	VPADDQ       X1, X0, X0
	VPADDQ       X3, X2, X2
	VPUNPCKHQDQ  X0, X0, X1
	VPUNPCKHQDQ  X2, X2, X3
	VPADDQ       X1, X0, X0
	VPADDQ       X3, X2, X2
	VMOVQ        X0, d0+32(FP)
	VMOVQ        X2, d1+40(FP)
	VZEROUPPER
	RET

// func hasAVX2() bool
//
// The CPU has AVX2, and the system keeps the registers (Intel's manual, volume 1, 14.7).
TEXT ·hasAVX2(SB), NOSPLIT, $0-1
	MOVB  $0, ret+0(FP)
	XORL  AX, AX
	CPUID
	CMPL  AX, $7
	JLT   no
	MOVL  $1, AX
	CPUID
	ANDL  $(1<<27 | 1<<28), CX // OSXSAVE and AVX
	CMPL  CX, $(1<<27 | 1<<28)
	JNE   no
	XORL  CX, CX
	XGETBV
	ANDL  $6, AX               // XMM and YMM
	CMPL  AX, $6
	JNE   no
	MOVL  $7, AX
	XORL  CX, CX
	CPUID
	BTL   $5, BX
	SETCS ret+0(FP)

no:
	RET
