/* Vectors of floats for one instruction set. cpu.c includes this and tile.h once per set; NYB_AVX512 or NYB_AVX2 is 1,
 * or neither (portable: vectors of the C compiler). ROWS x VECTORS accumulators fit the registers. */

#undef FN
#undef KERNEL
#undef NAME
#undef LANES
#undef ROWS
#undef KEEP
#undef VECTORS
#undef vf

#if NYB_AVX512
#define FN static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq")))
#define KERNEL static __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define NAME(x) x##_avx512
#define LANES 16
#define ROWS 6
#define VECTORS 4
typedef __m512 NAME(vf);
#elif NYB_AVX2
#define FN static inline __attribute__((always_inline, target("avx2,fma")))
#define KERNEL static __attribute__((target("avx2,fma")))
#define NAME(x) x##_avx2
#define LANES 8
#define ROWS 6
#define VECTORS 2
typedef __m256 NAME(vf);
#else
#define FN static inline
#define KERNEL static
#define NAME(x) x##_portable
#define LANES 4
#define ROWS 4
#define VECTORS 2
typedef float NAME(vf) __attribute__((vector_size(16)));
typedef int32_t NAME(vi) __attribute__((vector_size(16)));
typedef uint32_t NAME(vu) __attribute__((vector_size(16)));
#endif
#define vf NAME(vf)
#define KEEP (LANES > ROWS ? LANES : ROWS) /* floats that a vector for ROWS numbers takes */

#if NYB_AVX512
FN vf NAME(all)(float x) { return _mm512_set1_ps(x); }
FN vf NAME(load)(const float *p) { return _mm512_loadu_ps(p); }
FN void NAME(store)(float *p, vf a) { _mm512_storeu_ps(p, a); }
FN vf NAME(add)(vf a, vf b) { return _mm512_add_ps(a, b); }
FN vf NAME(sub)(vf a, vf b) { return _mm512_sub_ps(a, b); }
FN vf NAME(mul)(vf a, vf b) { return _mm512_mul_ps(a, b); }
FN vf NAME(fma)(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
FN vf NAME(max)(vf a, vf best) { return _mm512_max_ps(a, best); } /* NaN in a is passed over */
FN float NAME(largest)(vf a) { return _mm512_reduce_max_ps(a); }
FN float NAME(total)(vf a) { return _mm512_reduce_add_ps(a); }
/* Lanes first .. end - 1 of a, counted from lane 0; -infinity elsewhere. */
FN vf NAME(only)(vf a, int first, int end) {
  unsigned from = first <= 0 ? 0xffff : first >= 16 ? 0 : 0xffffu << first;
  unsigned to = end >= 16 ? 0xffff : end <= 0 ? 0 : 0xffffu >> (16 - end);
  return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (__mmask16)(from & to), a);
}
#elif NYB_AVX2
FN vf NAME(all)(float x) { return _mm256_set1_ps(x); }
FN vf NAME(load)(const float *p) { return _mm256_loadu_ps(p); }
FN void NAME(store)(float *p, vf a) { _mm256_storeu_ps(p, a); }
FN vf NAME(add)(vf a, vf b) { return _mm256_add_ps(a, b); }
FN vf NAME(sub)(vf a, vf b) { return _mm256_sub_ps(a, b); }
FN vf NAME(mul)(vf a, vf b) { return _mm256_mul_ps(a, b); }
FN vf NAME(fma)(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
FN vf NAME(max)(vf a, vf best) { return _mm256_max_ps(a, best); }
FN float NAME(largest)(vf a) {
  __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
FN float NAME(total)(vf a) {
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
/* p where x >= -126 or NaN, else 0 */
FN vf NAME(flush)(vf x, vf p) { return _mm256_and_ps(p, _mm256_cmp_ps(x, _mm256_set1_ps(-126), _CMP_NLT_UQ)); }
/* Adds the integer in the low bits of shifted to the exponents of a. */
FN vf NAME(raise)(vf a, vf shifted) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
}
FN vf NAME(only)(vf a, int first, int end) {
  __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  __m256i out = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane),
                                _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(end - 1)));
  return _mm256_blendv_ps(a, _mm256_set1_ps(-INFINITY), _mm256_castsi256_ps(out));
}
#else
FN vf NAME(all)(float x) { return (vf){x, x, x, x}; }
FN vf NAME(load)(const float *p) {
  vf a;
  memcpy(&a, p, sizeof a);
  return a;
}
FN void NAME(store)(float *p, vf a) { memcpy(p, &a, sizeof a); }
FN vf NAME(add)(vf a, vf b) { return a + b; }
FN vf NAME(sub)(vf a, vf b) { return a - b; }
FN vf NAME(mul)(vf a, vf b) { return a * b; }
FN vf NAME(fma)(vf a, vf b, vf c) { return a * b + c; }
FN vf NAME(pick)(NAME(vi) m, vf yes, vf no) { return (vf)((m & (NAME(vi))yes) | (~m & (NAME(vi))no)); }
FN vf NAME(max)(vf a, vf best) { return NAME(pick)(a > best, a, best); }
FN float NAME(largest)(vf a) {
  float b = a[0] > a[2] ? a[0] : a[2], c = a[1] > a[3] ? a[1] : a[3];
  return b > c ? b : c;
}
FN float NAME(total)(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
FN vf NAME(flush)(vf x, vf p) { return NAME(pick)(x < NAME(all)(-126), NAME(all)(0), p); }
FN vf NAME(raise)(vf a, vf shifted) { return (vf)((NAME(vu))a + ((NAME(vu))shifted << 23)); }
FN vf NAME(only)(vf a, int first, int end) {
  NAME(vi) lane = {0, 1, 2, 3}, low = {first, first, first, first}, high = {end, end, end, end};
  return NAME(pick)((lane >= low) & (lane < high), a, NAME(all)(-INFINITY));
}
#endif

/* 2^x for x <= 0 to 1e-7 relative, exactly 1 at 0, 0 below -150 (of vectors narrower than 512 bits, below -126), NaN
 * for NaN. x is the nearest integer n, which adding 1.5 * 2^23 leaves in the low bits, and a rest r of at most 1/2; 2^r
 * is 1 + r times the Chebyshev fit of (2^r - 1) / r. */
FN vf NAME(power_of_two)(vf x) {
#if NYB_AVX512
  x = _mm512_max_ps(_mm512_set1_ps(-200), x); /* -infinity has no rest; NaN stays */
  const vf n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = NAME(sub)(x, n);
#else
  const vf shift = NAME(all)(0x1.8p23f), shifted = NAME(add)(x, shift);
  const vf r = NAME(sub)(x, NAME(sub)(shifted, shift));
#endif
  vf p = NAME(all)(0x1.44138ap-13f);
  p = NAME(fma)(p, r, NAME(all)(0x1.5f0890p-10f));
  p = NAME(fma)(p, r, NAME(all)(0x1.3b2a54p-7f));
  p = NAME(fma)(p, r, NAME(all)(0x1.c6af6cp-5f));
  p = NAME(fma)(p, r, NAME(all)(0x1.ebfbe0p-3f));
  p = NAME(fma)(p, r, NAME(all)(0x1.62e430p-1f));
  p = NAME(fma)(p, r, NAME(all)(1));
#if NYB_AVX512
  return _mm512_scalef_ps(p, n);
#else
  return NAME(flush)(x, NAME(raise)(p, shifted));
#endif
}
