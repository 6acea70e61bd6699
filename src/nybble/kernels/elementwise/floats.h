/* Vectors of floats for one instruction set, with an exponential. A .c file includes this, and its kernels, once per
 * set: NYB_AVX512 or NYB_AVX2 is 1, or neither (portable: four lanes of whatever the machine has, products rounded
 * before they are added). Lanes never depend on one another but in v_sum, whose order is fixed, so an element's
 * result does not depend on where in a row it lies. + - * / are those of the compiler's vector types. */

#undef FN
#undef KERNEL
#undef NAME
#undef LANES
#undef vf
#undef v_all
#undef v_load
#undef v_store
#undef v_load_some
#undef v_store_some
#undef v_fma
#undef v_clamp
#undef v_exp
#undef v_sum
#undef v_softplus
#undef v_sigmoid
#undef v_silu

#if NYB_AVX512
#define FN static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq")))
#define KERNEL static __attribute__((noinline, target("avx512f,avx512bw,avx512vl,avx512dq")))
#define NAME(x) x##_avx512
#define LANES 16
typedef __m512 NAME(vf);
#elif NYB_AVX2
#define FN static inline __attribute__((always_inline, target("avx2,fma")))
#define KERNEL static __attribute__((noinline, target("avx2,fma")))
#define NAME(x) x##_avx2
#define LANES 8
typedef __m256 NAME(vf);
#else
#define FN static inline __attribute__((always_inline))
#define KERNEL static __attribute__((noinline))
#define NAME(x) x##_portable
#define LANES 4
typedef float NAME(vf) __attribute__((vector_size(16)));
typedef int32_t NAME(vi) __attribute__((vector_size(16)));
#endif
#define vf NAME(vf)
#define v_all NAME(v_all)
#define v_load NAME(v_load)
#define v_store NAME(v_store)
#define v_load_some NAME(v_load_some)
#define v_store_some NAME(v_store_some)
#define v_fma NAME(v_fma)
#define v_clamp NAME(v_clamp)
#define v_exp NAME(v_exp)
#define v_sum NAME(v_sum)
#define v_softplus NAME(v_softplus)
#define v_sigmoid NAME(v_sigmoid)
#define v_silu NAME(v_silu)

/* v_load_some and v_store_some touch the first n of a vector's lanes, 1 <= n <= LANES; the rest load as zero.
 * v_clamp keeps NaN. */
#if NYB_AVX512
FN vf v_all(float a) { return _mm512_set1_ps(a); }
FN vf v_load(const float *p) { return _mm512_loadu_ps(p); }
FN void v_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
FN vf v_load_some(const float *p, int n) { return _mm512_maskz_loadu_ps((__mmask16)(0xffffu >> (16 - n)), p); }
FN void v_store_some(float *p, vf a, int n) { _mm512_mask_storeu_ps(p, (__mmask16)(0xffffu >> (16 - n)), a); }
FN vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
FN vf v_clamp(vf a, float low, float high) { return _mm512_min_ps(v_all(high), _mm512_max_ps(v_all(low), a)); }
#elif NYB_AVX2
FN vf v_all(float a) { return _mm256_set1_ps(a); }
FN vf v_load(const float *p) { return _mm256_loadu_ps(p); }
FN void v_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
FN __m256i NAME(first_lanes)(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FN vf v_load_some(const float *p, int n) { return n == 8 ? v_load(p) : _mm256_maskload_ps(p, NAME(first_lanes)(n)); }
FN void v_store_some(float *p, vf a, int n) {
  if (n == 8) v_store(p, a); /* masked stores are slow on some machines */
  else _mm256_maskstore_ps(p, NAME(first_lanes)(n), a);
}
FN vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
FN vf v_clamp(vf a, float low, float high) { return _mm256_min_ps(v_all(high), _mm256_max_ps(v_all(low), a)); }
#else
FN vf v_all(float a) { return (vf){a, a, a, a}; }
FN vf v_load(const float *p) {
  vf a;
  memcpy(&a, p, sizeof a);
  return a;
}
FN void v_store(float *p, vf a) { memcpy(p, &a, sizeof a); }
FN vf v_load_some(const float *p, int n) {
  if (n == LANES) return v_load(p);
  vf a = v_all(0);
  for (int i = 0; i < n; i++) a[i] = p[i];
  return a;
}
FN void v_store_some(float *p, vf a, int n) {
  if (n == LANES) return v_store(p, a);
  for (int i = 0; i < n; i++) p[i] = a[i];
}
FN vf v_fma(vf a, vf b, vf c) { return a * b + c; }
FN vf v_clamp(vf a, float low, float high) {
  for (int i = 0; i < LANES; i++) {
    if (a[i] < low) a[i] = low;
    if (a[i] > high) a[i] = high;
  }
  return a;
}
#endif

/* e^x to about one unit in the last place: x = n ln 2 + r, the polynomial of Cephes' expf for e^r, then 2^n. */
FN vf v_exp(vf x) {
  x = v_clamp(x, -104.0f, 89.0f); /* 0 below, infinity above */
#if NYB_AVX512
  vf n = _mm512_roundscale_ps(x * v_all(1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif NYB_AVX2
  vf n = _mm256_round_ps(x * v_all(1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  vf n = (x * v_all(1.44269504f) + v_all(0x1.8p23f)) - v_all(0x1.8p23f);
#endif
  vf r = v_fma(n, v_all(-0.693359375f), x);
  r = v_fma(n, v_all(2.12194440e-4f), r);
  vf p = v_all(1.9875691500e-4f);
  p = v_fma(p, r, v_all(1.3981999507e-3f));
  p = v_fma(p, r, v_all(8.3334519073e-3f));
  p = v_fma(p, r, v_all(4.1665795894e-2f));
  p = v_fma(p, r, v_all(1.6666665459e-1f));
  p = v_fma(p, r, v_all(5.0000001201e-1f));
  p = v_fma(p, r * r, r) + v_all(1.0f);
#if NYB_AVX512
  return _mm512_scalef_ps(p, n);
#elif NYB_AVX2 /* 2^n in two factors: n goes beyond the exponents of one float */
  __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  __m256i one = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  __m256i two = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23);
  return p * _mm256_castsi256_ps(one) * _mm256_castsi256_ps(two);
#else
  vf shifted = n + v_all(0x1.8p23f); /* its low bits are n */
  NAME(vi) whole, one, two;
  memcpy(&whole, &shifted, sizeof whole);
  whole = (whole & 0x3ff) - ((whole & 0x200) << 1);
  one = whole >> 1;
  two = (whole - one + 127) << 23;
  one = (one + 127) << 23;
  vf a, b;
  memcpy(&a, &one, sizeof a);
  memcpy(&b, &two, sizeof b);
  return p * a * b;
#endif
}

/* Lanes added pairwise: upper half to lower half, until one is left. */
FN float v_sum(vf a) {
  float lanes[LANES];
  v_store(lanes, a);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}

/* ln(1 + e^x) = max(x, 0) + ln(1 + u) with u = e^-|x|, and ln(1 + u) = 2 artanh(u / (2 + u)): a series in at most 1/9
 * that keeps its relative precision where u is tiny. */
FN vf v_softplus(vf x) {
  vf positive = v_clamp(x, 0.0f, INFINITY), u = v_exp(x - positive - positive), s = u / (v_all(2.0f) + u), t = s * s;
  vf p = v_all(1.0f / 15);
  p = v_fma(p, t, v_all(1.0f / 13));
  p = v_fma(p, t, v_all(1.0f / 11));
  p = v_fma(p, t, v_all(1.0f / 9));
  p = v_fma(p, t, v_all(1.0f / 7));
  p = v_fma(p, t, v_all(1.0f / 5));
  p = v_fma(p, t, v_all(1.0f / 3));
  p = v_fma(p, t, v_all(1.0f));
  return positive + (s + s) * p;
}

FN vf v_sigmoid(vf x) { return v_all(1.0f) / (v_all(1.0f) + v_exp(v_all(0.0f) - x)); }
FN vf v_silu(vf x) { return x / (v_all(1.0f) + v_exp(v_all(0.0f) - x)); }
