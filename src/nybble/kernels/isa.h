/* Instruction sets, each level a superset of those below it; kernels fall back to the next lower one they have. */
#ifndef NYB_ISA_H
#define NYB_ISA_H

enum {
  NYB_ISA_PORTABLE = 0,
  NYB_ISA_AVX2 = 1,       /* with FMA */
  NYB_ISA_AVX512 = 2,     /* F, BW, VL, DQ and VNNI */
  NYB_ISA_AVX512BF16 = 3, /* and the BF16 dot product */
};

int nyb_isa(void); /* the best instruction set of this machine */

#endif
