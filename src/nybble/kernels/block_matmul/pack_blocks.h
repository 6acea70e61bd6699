/* Rows of x for the kernels of four-bit weights, in chunks of 64 elements, or of 128 for 512 bits: in each step the
 * elements of block 0, 1, 2, 3 ... in this order.
 *
 * BF16: 8 steps of two BF16. Step 4h + q has elements 8h + q and 8h + q + 4 of each block.
 * INT8: 4 steps of four INT8, -12 times the sum of each block as int32, half the scale of each block as float. Step
 * 2h + r has elements 8h + r, + 2, + 4, + 6 of each block. Half, because INT8 meets doubled weights. For portable C,
 * which has no steps, the elements stay in their order. */

/* The scale that rounds a block whose largest magnitude has these bits, and what to multiply with to round. Of a block
 * too small for floats all is rounded to zero; one that is not finite has NaN, so that it shows. */
static inline float int8_scale(uint32_t largest, float *inverse) {
  const float scale = float_of(largest) / 127;
  *inverse = 0;
  if (largest >= 0x7f800000) return NAN;
  if (scale < SMALLEST_SCALE) return 0;
  *inverse = 1 / scale;
  return scale;
}

/* 64 elements; where element i of block b goes is `place`. */
#define PACK_INT8(name, attributes, place)                                                                             \
  static attributes void name##_64(const float v[64], int8_t *out) {                                                   \
    for (int b = 0; b < 4; b++) {                                                                                      \
      float inverse;                                                                                                   \
      uint32_t largest = 0;                                                                                            \
      int32_t sum = 0, q[16];                                                                                          \
      for (int i = 0; i < 16; i++) {                                                                                   \
        const uint32_t bits = bits_of(v[16 * b + i]) & 0x7fffffff;                                                     \
        largest = bits > largest ? bits : largest;                                                                     \
      }                                                                                                                \
      const float scale = int8_scale(largest, &inverse);                                                               \
      for (int i = 0; i < 16; i++) { /* adding 1.5 * 2^23 rounds to an integer, ties to even */                        \
        q[i] = inverse == 0 ? 0 : (int32_t)(bits_of(v[16 * b + i] * inverse + 0x1.8p23f) - 0x4b400000u);               \
        sum += q[i];                                                                                                   \
      }                                                                                                                \
      for (int i = 0; i < 16; i++) out[place] = (int8_t)q[i];                                                          \
      ((int32_t *)(out + 64))[b] = -12 * sum;                                                                          \
      ((float *)(out + 80))[b] = 0.5f * scale;                                                                         \
    }                                                                                                                  \
  }                                                                                                                    \
  static attributes void name(const void *x, int x_is_bf16, int64_t k, int rounded, int is_split, void *out) {         \
    (void)rounded, (void)is_split;                                                                                     \
    for (int64_t at = 0; at < k; at += 64) {                                                                           \
      float v[64] = {0};                                                                                               \
      const int count = k - at < 64 ? (int)(k - at) : 64;                                                              \
      for (int i = 0; i < count; i++)                                                                                  \
        v[i] = x_is_bf16 ? float_of((uint32_t)((const uint16_t *)x)[at + i] << 16) : ((const float *)x)[at + i];       \
      name##_64(v, (int8_t *)out + at / 64 * INT8_CHUNK);                                                              \
    }                                                                                                                  \
  }
PACK_INT8(pack_int8_portable, , 16 * b + i)
#if defined(__x86_64__)
PACK_INT8(pack_int8_avx2, __attribute__((target("avx2,fma"))), 16 * (i / 8 * 2 + i % 2) + 4 * b + i % 8 / 2)
#endif
#undef PACK_INT8

#if defined(__x86_64__)
#define WIDE "avx512f,avx512bw,avx512vl,avx512dq"

/* 16 elements as floats, zeros past the end. */
static inline __attribute__((always_inline, target(WIDE))) __m512 x_16(const void *x, int x_is_bf16, int64_t at,
                                                                      int64_t k) {
  const int64_t left = k - at;
  const __mmask16 m = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
  if (!x_is_bf16) return _mm512_maskz_loadu_ps(m, (const float *)x + at);
  __m256i h = _mm256_maskz_loadu_epi16(m, (const uint16_t *)x + at);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

/* What two halves of a chunk have for the same steps, side by side: steps 0 and 1, or 2 and 3. */
static inline __attribute__((always_inline, target(WIDE))) __m512i join_steps(__m512i a, __m512i b, int is_later) {
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  return _mm512_permutex2var_epi64(a, is_later ? _mm512_add_epi64(first, _mm512_set1_epi64(4)) : first, b);
}

static __attribute__((target(WIDE ",avx512bf16"))) void pack_bf16_blocks(const void *x, int x_is_bf16, int64_t k,
                                                                         int rounded, int is_split, void *out) {
  (void)rounded, (void)is_split;
  /* Word 2b + r of step 4h + q is element 16b + 8h + q + 4r; the words of two vectors hold four steps. */
  const __m512i low = _mm512_set_epi16(55, 51, 39, 35, 23, 19, 7, 3, 54, 50, 38, 34, 22, 18, 6, 2, 53, 49, 37, 33, 21,
                                       17, 5, 1, 52, 48, 36, 32, 20, 16, 4, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(8));
  for (int64_t at = 0; at < k; at += 128, out = (char *)out + 2 * BF16_CHUNK) {
    __m512i steps[2][2]; /* of 64 elements, h */
    for (int i = 0; i < 2; i++) {
      __m512 v[4];
      for (int b = 0; b < 4; b++) v[b] = x_16(x, x_is_bf16, at + 64 * i + 16 * b, k);
      __m512i first = (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]), second = (__m512i)_mm512_cvtne2ps_pbh(v[3], v[2]);
      steps[i][0] = _mm512_permutex2var_epi16(first, low, second);
      steps[i][1] = _mm512_permutex2var_epi16(first, high, second);
    }
    for (int i = 0; i < 4; i++)
      _mm512_store_si512((char *)out + 64 * i, join_steps(steps[0][i >> 1], steps[1][i >> 1], i & 1));
  }
}

/* The largest of each block's bits without sign, in all lanes of its quarter. */
static inline __attribute__((always_inline, target(WIDE))) __m512i largest_bits(const __m512 v[4]) {
  __m512i m[4];
  for (int b = 0; b < 4; b++) m[b] = _mm512_and_si512(_mm512_castps_si512(v[b]), _mm512_set1_epi32(0x7fffffff));
  __m512i a = _mm512_max_epu32(_mm512_shuffle_i32x4(m[0], m[1], 0x44), _mm512_shuffle_i32x4(m[0], m[1], 0xee));
  __m512i b = _mm512_max_epu32(_mm512_shuffle_i32x4(m[2], m[3], 0x44), _mm512_shuffle_i32x4(m[2], m[3], 0xee));
  a = _mm512_max_epu32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  a = _mm512_max_epu32(a, _mm512_shuffle_epi32(a, 0x4e));
  return _mm512_max_epu32(a, _mm512_shuffle_epi32(a, 0xb1));
}

/* Rounded products; of what is not finite, the lowest byte of the integer is 0. */
static inline __attribute__((always_inline, target(WIDE))) __m128i times(__m512 v, __m512 inverse) {
  return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(v, inverse)));
}

/* 64 elements: the steps; -12 times the blocks' sums; half of the scales, where 16 bytes of them belong. */
static inline __attribute__((always_inline, target(WIDE ",avx512vnni"))) __m512i
int8_64(const void *x, int x_is_bf16, int64_t at, int64_t k, char *raised, char *scales) {
  const __m512i within = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  const __m512i blocks = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512 v[4];
  for (int b = 0; b < 4; b++) v[b] = x_16(x, x_is_bf16, at + 16 * b, k);
  const __m512i most = largest_bits(v);
  __m512 scale = _mm512_div_ps(_mm512_castsi512_ps(most), _mm512_set1_ps(127)); /* int8_scale, four at once */
  const __mmask16 finite = _mm512_cmplt_epi32_mask(most, _mm512_set1_epi32(0x7f800000));
  const __mmask16 used = _mm512_cmp_ps_mask(scale, _mm512_set1_ps(SMALLEST_SCALE), _CMP_GE_OQ) & finite;
  const __m512 inverse = _mm512_maskz_div_ps(used, _mm512_set1_ps(1), scale);
  __m512i q = _mm512_setzero_si512();
  q = _mm512_inserti32x4(q, times(v[0], _mm512_shuffle_f32x4(inverse, inverse, 0x00)), 0);
  q = _mm512_inserti32x4(q, times(v[1], _mm512_shuffle_f32x4(inverse, inverse, 0x55)), 1);
  q = _mm512_inserti32x4(q, times(v[2], _mm512_shuffle_f32x4(inverse, inverse, 0xaa)), 2);
  q = _mm512_inserti32x4(q, times(v[3], _mm512_shuffle_f32x4(inverse, inverse, 0xff)), 3);
  q = _mm512_permutexvar_epi32(blocks, _mm512_shuffle_epi8(q, within));
  const __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(12), q);
  const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
  const __m128i one = _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
  _mm_storeu_si128((__m128i *)raised, _mm_sub_epi32(_mm_setzero_si128(), one));
  scale = _mm512_maskz_mul_ps(used, scale, _mm512_set1_ps(0.5f));
  scale = _mm512_mask_mov_ps(scale, (__mmask16)~finite, _mm512_set1_ps(NAN));
  const __m512i each = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps((float *)scales, _mm512_castps512_ps128(_mm512_permutexvar_ps(each, scale)));
  return q;
}
static __attribute__((target(WIDE ",avx512vnni"))) void pack_int8_avx512(const void *x, int x_is_bf16, int64_t k,
                                                                         int rounded, int is_split, void *out) {
  (void)rounded, (void)is_split;
  for (int64_t at = 0; at < k; at += 128) {
    char *o = (char *)out + at / 64 * INT8_CHUNK;
    const __m512i a = int8_64(x, x_is_bf16, at, k, o + 128, o + 160);
    const __m512i b = int8_64(x, x_is_bf16, at + 64, k, o + 144, o + 176);
    _mm512_storeu_si512(o, join_steps(a, b, 0));
    _mm512_storeu_si512(o + 64, join_steps(a, b, 1));
  }
}
#undef WIDE
#endif
