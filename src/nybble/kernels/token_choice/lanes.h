/* What is done to whole blocks of a row, for one instruction set: the largest entry, weights of the softmax, random
 * bits. cpu.c includes this once per set; NYB_AVX512 or NYB_AVX2 is 1, or neither (portable). Every operation is
 * rounded by itself, so all sets give the same bits. */

#undef FN
#undef KERNEL
#undef NAME
#undef LANES
#undef vf
#undef vi
#undef vh
#undef vd
#undef vu

#if NYB_AVX512
#define FN static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq")))
#define KERNEL static __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#define NAME(x) x##_avx512
#define LANES 8
#elif NYB_AVX2
#define FN static inline __attribute__((always_inline, target("avx2,fma")))
#define KERNEL static __attribute__((target("avx2,fma")))
#define NAME(x) x##_avx2
#define LANES 4
#else
#define FN static inline
#define KERNEL static
#define NAME(x) x##_portable
#define LANES 2
#endif
typedef float NAME(vf) __attribute__((vector_size(8 * LANES), aligned(4), may_alias));  /* 2 * LANES floats */
typedef int32_t NAME(vi) __attribute__((vector_size(8 * LANES)));
typedef float NAME(vh) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));  /* LANES floats */
typedef double NAME(vd) __attribute__((vector_size(8 * LANES)));
typedef uint64_t NAME(vu) __attribute__((vector_size(8 * LANES)));
#define vf NAME(vf)
#define vi NAME(vi)
#define vh NAME(vh)
#define vd NAME(vd)
#define vu NAME(vu)

/* The product of the low words. */
FN vu NAME(multiply)(vu a, vu b) {
#if NYB_AVX512
  return (vu)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif NYB_AVX2
  return (vu)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  return a * b;
#endif
}

KERNEL float NAME(largest)(const float *x, int64_t n) {
  float best = -INFINITY;
  int64_t i = 0;
  if (n >= 2 * LANES) {
    vf top = *(const vf *)x;
    for (i = 2 * LANES; i + 2 * LANES <= n; i += 2 * LANES) {
      vf next = *(const vf *)(x + i);
      vi above = next > top;
      top = (vf)((above & (vi)next) | (~above & (vi)top));
    }
    for (int k = 0; k < 2 * LANES; k++) best = top[k] > best ? top[k] : best;
  }
  for (; i < n; i++) best = x[i] > best ? x[i] : best;
  return best;
}

/* e^scaled in units of 2^-40 for scaled <= 0. Adding 1.5 * 2^52 rounds to the nearest integer and leaves it in the low
 * bits; so does 2^52 for what is not negative. */
FN vu NAME(weights_of)(vd scaled) {
  const vd shift = (vd){} + 0x1.8p52, ones = (vd){} + 0x1p52;
  vu above = (vu)(scaled > -30.0);
  vd power = (vd)((above & (vu)scaled) | (~above & (vu)((vd){} - 30.0))) * 0x1.71547652b82fep0;
  vd shifted = power + shift, r = power - (shifted - shift);
  vd p = (vd){} + 0x1.b63880a30e9ffp-24;
  p = p * r + 0x1.63d136366db24p-20;
  p = p * r + 0x1.ffcb9515a8016p-17;
  p = p * r + 0x1.4308ac85aa947p-13;
  p = p * r + 0x1.5d87fe86fe88ep-10;
  p = p * r + 0x1.3b2ab7181b755p-7;
  p = p * r + 0x1.c6b08d7047e52p-5;
  p = p * r + 0x1.ebfbdff823cedp-3;
  p = p * r + 0x1.62e42fefa39efp-1;
  p = p * r + 1.0;
  p = (vd)((vu)p + (((vu)shifted + 40) << 52));
  return (vu)(p + ones) - (vu)ones;
}

/* Weights of n entries, 0 below `least`; their sum. `out` has room for n rounded up to LANES. */
KERNEL uint64_t NAME(weigh)(const float *x, int64_t n, float least, double best, double temperature, uint64_t *out) {
  vu sum = {};
  float tail[LANES];
  for (int64_t i = 0; i < n; i += LANES) {
    const float *from = x + i;
    if (n - i < LANES) {
      for (int k = 0; k < LANES; k++) tail[k] = i + k < n ? x[i + k] : -INFINITY;
      from = tail;
    }
    vd wide = __builtin_convertvector(*(const vh *)from, vd);
    vu weight = NAME(weights_of)((wide - best) / temperature) & (vu)(wide >= (double)least);
    memcpy(out + i, &weight, sizeof weight);
    sum += weight;
  }
  uint64_t total = 0;
  for (int k = 0; k < LANES; k++) total += sum[k];
  return total;
}

/* Philox4x32-10 of n counters from `first` on: 2 n words of 64 bits, for tokens 2 * first and following. `out` has room
 * for n rounded up to LANES. */
KERNEL void NAME(philox)(uint64_t first, int64_t n, const rule *r, uint64_t *out) {
  const vu low = (vu){} + 0xFFFFFFFFu, m0 = (vu){} + 0xD2511F53u, m1 = (vu){} + 0xCD9E8D57u;
  vu lane;
  for (int k = 0; k < LANES; k++) lane[k] = (uint64_t)k;
  for (int64_t i = 0; i < n; i += LANES) {
    vu a = lane + (first + (uint64_t)i), b = (vu){} + r->position, c = (vu){} + r->choice, d = {};
    uint32_t k0 = (uint32_t)r->seed, k1 = (uint32_t)(r->seed >> 32);
    for (int round = 0; round < 10; round++) {
      vu p = NAME(multiply)(m0, a), q = NAME(multiply)(m1, c);
      a = (q >> 32) ^ b ^ k0;
      b = q & low;
      c = (p >> 32) ^ d ^ k1;
      d = p & low;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    vu even = a | (b << 32), odd = c | (d << 32);
    for (int k = 0; k < LANES; k++) {
      out[2 * (i + k)] = even[k];
      out[2 * (i + k) + 1] = odd[k];
    }
  }
}

/* What scaled + noise of n entries is at most; -infinity below `least` and `lowest`. `out` has room as above.
 *
 * The noise of u = (b + 1/2) / 2^52 is at most -log(1 - u), and 2^52 (1 - u) - 1/2 is ~b: its power of two is that of
 * the float. */
KERNEL void NAME(promise)(const float *x, int64_t n, float least, double lowest, double best, double temperature,
                          const uint64_t *bits, double *out) {
  const vu none = (vu)((vd){} - INFINITY), one = (vu)((vd){} + 0x1p52), all = (vu){} + 0xFFFFFFFFFFFFFull;
  float tail[LANES];
  for (int64_t i = 0; i < n; i += LANES) {
    const float *from = x + i;
    if (n - i < LANES) {
      for (int k = 0; k < LANES; k++) tail[k] = i + k < n ? x[i + k] : -INFINITY;
      from = tail;
    }
    vd wide = __builtin_convertvector(*(const vh *)from, vd), scaled = (wide - best) / temperature;
    vu drawn;
    memcpy(&drawn, bits + i, sizeof drawn);
    vu power = (vu)((vd)(((drawn >> 12) ^ all) | one) - 0x1p52 + 0.5) >> 52; /* 1022 .. 1075 */
    vd noise = (1075.0 - ((vd)(power | one) - 0x1p52)) * 0.6931471805599454 + 1e-9;
    vu stays = (vu)(wide >= (double)least) & (vu)(scaled >= lowest);
    vd most = (vd)((stays & (vu)(scaled + noise)) | (~stays & none));
    memcpy(out + i, &most, sizeof most);
  }
}

/* -infinity where a mask has no bit. */
KERNEL void NAME(hide)(float *x, int64_t n, const uint8_t *mask, int64_t bytes) {
  const block_bits bit = {1, 2, 4, 8, 16, 32, 64, 128}, none = (block_bits)((block_floats){} - INFINITY);
  int64_t whole = n / 8 < bytes ? n / 8 : bytes;
  for (int64_t i = 0; i < whole; i++) {
    block_bits stays = ((bit & mask[i]) != 0);
    *(block_bits *)(x + 8 * i) = (stays & *(block_bits *)(x + 8 * i)) | (~stays & none);
  }
  for (int64_t i = 8 * whole; i < n; i++) {
    if (!(i / 8 < bytes && mask[i / 8] >> i % 8 & 1)) x[i] = -INFINITY;
  }
}
