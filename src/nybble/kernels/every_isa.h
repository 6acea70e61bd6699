/* Includes NYB_BODY, a path from this folder, once for each kind of vectors: one source, of which the compiler makes three.
 * It finds NYB_AVX2 and NYB_AVX512, and ends its names in _portable, _avx2 or _avx512; CALL chooses among these.
 * No guard: a file may have more than one body. */
#define NYB_AVX512 0
#define NYB_AVX2 0
#include NYB_BODY
#if defined(__x86_64__)
#undef NYB_AVX2
#define NYB_AVX2 1
#include NYB_BODY
#undef NYB_AVX2
#undef NYB_AVX512
#define NYB_AVX2 0
#define NYB_AVX512 1
#include NYB_BODY
#endif
#undef NYB_AVX2
#undef NYB_AVX512
#undef NYB_BODY

#ifndef CALL
#if defined(__x86_64__)
#define CALL(isa, function, ...)                                     \
  do {                                                               \
    if ((isa) >= NYB_ISA_AVX512) function##_avx512(__VA_ARGS__);     \
    else if ((isa) >= NYB_ISA_AVX2) function##_avx2(__VA_ARGS__);    \
    else function##_portable(__VA_ARGS__);                           \
  } while (0)
#else
#define CALL(isa, function, ...) function##_portable(__VA_ARGS__)
#endif
#endif
