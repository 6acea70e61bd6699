/* What this processor, and the system on it, can run: see isa.h. */
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

int nyb_isa(void) {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return NYB_ISA_PORTABLE;
  int fma = (c & bit_FMA) != 0;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0)); /* which registers the system saves */
  if ((low & 6) != 6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return NYB_ISA_PORTABLE;
  const unsigned wide = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
  if ((low & 0xe6) == 0xe6 && fma && (b & wide) == wide && (c & bit_AVX512VNNI)) {
    const unsigned bf16 = 1u << 5; /* leaf 7, subleaf 1, EAX */
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bf16)) return NYB_ISA_AVX512BF16;
    return NYB_ISA_AVX512;
  }
  if (fma && (b & bit_AVX2)) return NYB_ISA_AVX2;
#endif
  return NYB_ISA_PORTABLE;
}
