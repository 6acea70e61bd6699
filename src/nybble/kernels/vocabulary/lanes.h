/* Vectors of doubles, and of the floats they come from, for one instruction set. cpu.c includes this and rows.h once
 * per set; NYB_AVX512 or NYB_AVX2 is 1, or neither (portable: vectors of the C compiler). */

#undef FN
#undef KERNEL
#undef NAME
#undef LANES
#undef vd
#undef vm

#if NYB_AVX512
#define FN static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq")))
#define KERNEL static __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define NAME(x) x##_avx512
#define LANES 8
typedef __m512d NAME(vd);
typedef __mmask8 NAME(vm);
#elif NYB_AVX2
#define FN static inline __attribute__((always_inline, target("avx2,fma")))
#define KERNEL static __attribute__((target("avx2,fma")))
#define NAME(x) x##_avx2
#define LANES 4
typedef __m256d NAME(vd);
typedef __m256d NAME(vm);
#else
#define FN static inline
#define KERNEL static
#define NAME(x) x##_portable
#define LANES 2
typedef double NAME(vd) __attribute__((vector_size(16)));
typedef int64_t NAME(vm) __attribute__((vector_size(16)));
typedef uint64_t NAME(vu) __attribute__((vector_size(16)));
#endif
#define vd NAME(vd)
#define vm NAME(vm)

#if NYB_AVX512
FN vd NAME(all)(double x) { return _mm512_set1_pd(x); }
FN vd NAME(widen)(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
FN vd NAME(add)(vd a, vd b) { return _mm512_add_pd(a, b); }
FN vd NAME(sub)(vd a, vd b) { return _mm512_sub_pd(a, b); }
FN vd NAME(fma)(vd a, vd b, vd c) { return _mm512_fmadd_pd(a, b, c); }
FN vm NAME(not_less)(vd a, vd b) { return _mm512_cmp_pd_mask(a, b, _CMP_NLT_UQ); }
FN vd NAME(keep)(vm m, vd a) { return _mm512_maskz_mov_pd(m, a); }
/* The largest of n floats, a multiple of 64, and of best; NaN is passed over. */
FN float NAME(largest)(const float *p, int n, float best) {
  __m512 a = _mm512_set1_ps(best), b = a, c = a, d = a;
  for (int i = 0; i < n; i += 64) {
    a = _mm512_max_ps(_mm512_loadu_ps(p + i), a);
    b = _mm512_max_ps(_mm512_loadu_ps(p + i + 16), b);
    c = _mm512_max_ps(_mm512_loadu_ps(p + i + 32), c);
    d = _mm512_max_ps(_mm512_loadu_ps(p + i + 48), d);
  }
  return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(a, b), _mm512_max_ps(c, d)));
}
#elif NYB_AVX2
FN vd NAME(all)(double x) { return _mm256_set1_pd(x); }
FN vd NAME(widen)(const float *p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
FN vd NAME(add)(vd a, vd b) { return _mm256_add_pd(a, b); }
FN vd NAME(sub)(vd a, vd b) { return _mm256_sub_pd(a, b); }
FN vd NAME(fma)(vd a, vd b, vd c) { return _mm256_fmadd_pd(a, b, c); }
FN vm NAME(not_less)(vd a, vd b) { return _mm256_cmp_pd(a, b, _CMP_NLT_UQ); }
FN vd NAME(keep)(vm m, vd a) { return _mm256_and_pd(m, a); }
FN vd NAME(raise)(vd a, vd shifted) {
  return _mm256_castsi256_pd(
      _mm256_add_epi64(_mm256_castpd_si256(a), _mm256_slli_epi64(_mm256_castpd_si256(shifted), 52)));
}
FN float NAME(largest)(const float *p, int n, float best) {
  __m256 a = _mm256_set1_ps(best), b = a;
  for (int i = 0; i < n; i += 16) {
    a = _mm256_max_ps(_mm256_loadu_ps(p + i), a);
    b = _mm256_max_ps(_mm256_loadu_ps(p + i + 8), b);
  }
  float found[8];
  _mm256_storeu_ps(found, _mm256_max_ps(a, b));
  for (int i = 0; i < 8; i++) best = found[i] > best ? found[i] : best;
  return best;
}
#else
FN vd NAME(all)(double x) { return (vd){x, x}; }
FN vd NAME(widen)(const float *p) { return (vd){p[0], p[1]}; }
FN vd NAME(add)(vd a, vd b) { return a + b; }
FN vd NAME(sub)(vd a, vd b) { return a - b; }
FN vd NAME(fma)(vd a, vd b, vd c) { return a * b + c; }
FN vm NAME(not_less)(vd a, vd b) { return ~(vm)(a < b); }
FN vd NAME(keep)(vm m, vd a) { return (vd)(m & (vm)a); }
FN vd NAME(raise)(vd a, vd shifted) { return (vd)((NAME(vu))a + ((NAME(vu))shifted << 52)); }
FN float NAME(largest)(const float *p, int n, float best) {
  for (int i = 0; i < n; i++) best = p[i] > best ? p[i] : best;
  return best;
}
#endif

/* e^x for x <= 0; 0 below -700, or from there on gradually; NaN for NaN. With n the nearest integer, or sixteenth,
 * e^x = 2^n 2^r, and 2^r is 1 + r times the Chebyshev fit of (2^r - 1) / r. Adding 1.5 * 2^52 (2^48) rounds to n and
 * leaves it in the low bits. */
#if NYB_AVX512
FN vd NAME(exponential)(vd x) { /* 2e-12 relative */
  static const double roots[16] = {
      0x1.0000000000000p+0, 0x1.0b5586cf9890fp+0, 0x1.172b83c7d517bp+0, 0x1.2387a6e756238p+0,
      0x1.306fe0a31b715p+0, 0x1.3dea64c123422p+0, 0x1.4bfdad5362a27p+0, 0x1.5ab07dd485429p+0,
      0x1.6a09e667f3bcdp+0, 0x1.7a11473eb0187p+0, 0x1.8ace5422aa0dbp+0, 0x1.9c49182a3f090p+0,
      0x1.ae89f995ad3adp+0, 0x1.c199bdd85529cp+0, 0x1.d5818dcfba487p+0, 0x1.ea4afa2a490dap+0};
  const __m512d shift = _mm512_set1_pd(0x1.8p48);
  __m512d scaled = _mm512_max_pd(_mm512_set1_pd(-2000), _mm512_mul_pd(x, _mm512_set1_pd(0x1.71547652b82fep0)));
  __m512d shifted = _mm512_add_pd(scaled, shift), n = _mm512_sub_pd(shifted, shift);
  __m512d r = _mm512_sub_pd(scaled, n), p = _mm512_set1_pd(0x1.3b2bfa0553142p-7);
  p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(0x1.c6b3488206d06p-5));
  p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(0x1.ebfbdff78ad41p-3));
  p = _mm512_fmadd_pd(p, r, _mm512_set1_pd(0x1.62e42fee4615fp-1));
  const __m512i which = _mm512_castpd_si512(shifted); /* the low four bits count */
  __m512d root = _mm512_permutex2var_pd(_mm512_loadu_pd(roots), which, _mm512_loadu_pd(roots + 8));
  root = _mm512_scalef_pd(root, n); /* takes the floor of n: the sixteenths are in the root */
  return _mm512_fmadd_pd(_mm512_mul_pd(p, r), root, root);
}
#else
FN vd NAME(exponential)(vd x) { /* 4e-14 relative */
  const vd shift = NAME(all)(0x1.8p52);
  vd scaled = NAME(fma)(x, NAME(all)(0x1.71547652b82fep0), NAME(all)(0.0));
  vd shifted = NAME(add)(scaled, shift);
  vd r = NAME(sub)(scaled, NAME(sub)(shifted, shift));
  vd p = NAME(all)(0x1.b63880a30e9ffp-24);
  p = NAME(fma)(p, r, NAME(all)(0x1.63d136366db24p-20));
  p = NAME(fma)(p, r, NAME(all)(0x1.ffcb9515a8016p-17));
  p = NAME(fma)(p, r, NAME(all)(0x1.4308ac85aa947p-13));
  p = NAME(fma)(p, r, NAME(all)(0x1.5d87fe86fe88ep-10));
  p = NAME(fma)(p, r, NAME(all)(0x1.3b2ab7181b755p-7));
  p = NAME(fma)(p, r, NAME(all)(0x1.c6b08d7047e52p-5));
  p = NAME(fma)(p, r, NAME(all)(0x1.ebfbdff823cedp-3));
  p = NAME(fma)(p, r, NAME(all)(0x1.62e42fefa39efp-1));
  p = NAME(fma)(p, r, NAME(all)(1.0));
  return NAME(keep)(NAME(not_less)(x, NAME(all)(-700.0)), NAME(raise)(p, shifted));
}
#endif

FN double NAME(total)(vd a, vd b, vd c, vd d) {
  double lanes[LANES], sum = 0;
  a = NAME(add)(NAME(add)(a, b), NAME(add)(c, d));
  memcpy(lanes, &a, sizeof lanes);
  for (int i = 0; i < LANES; i++) sum += lanes[i];
  return sum;
}
