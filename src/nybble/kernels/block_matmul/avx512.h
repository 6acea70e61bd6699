/* AVX-512: weights to BF16 in registers, and rows of weights and of x into operands. panel.h multiplies. */
#if defined(__x86_64__)
#include <immintrin.h>

#define WIDE "avx512f,avx512bw,avx512vl,avx512dq"
#define FN static inline __attribute__((always_inline, target(WIDE)))

/* What decoding needs besides the codes, in registers. */
typedef struct {
  __m512i nibble, quarter, half, magnitude[4];
} constants;

FN constants load_constants(void) {
  constants c;
  c.nibble = _mm512_set1_epi16(15);
  /* For each byte of 32, where the values of its scale begin: 16 values per block of 8 or of 16 bytes. */
  c.quarter = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(_mm_set1_epi16(16), _mm_set1_epi16(0))),
                                 _mm256_set_m128i(_mm_set1_epi16(48), _mm_set1_epi16(32)), 1);
  c.half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  for (int i = 0; i < 4; i++) c.magnitude[i] = _mm512_load_si512(tables.e4m3 + 32 * i);
  return c;
}

FN __m512i join(const uint16_t *low, const uint16_t *high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_load_si256((const __m256i *)low)),
                            _mm256_load_si256((const __m256i *)high), 1);
}

/* 64 elements: 32 even ones, then 32 odd ones. */
FN void nvfp4_64(const constants *c, __m256i codes, const uint8_t *s, __m512i *even, __m512i *odd) {
  __m512i low = join(tables.nvfp4[s[0]], tables.nvfp4[s[1]]);
  __m512i high = join(tables.nvfp4[s[2]], tables.nvfp4[s[3]]);
  __m512i words = _mm512_cvtepu8_epi16(codes);
  /* The permutation reads six bits of an index, so the high nibble needs no mask. */
  *even = _mm512_permutex2var_epi16(low, _mm512_ternarylogic_epi32(words, c->nibble, c->quarter, 0xea), high);
  *odd = _mm512_permutex2var_epi16(low, _mm512_or_si512(_mm512_srli_epi16(words, 4), c->quarter), high);
}
FN void mxfp4_64(const constants *c, __m256i codes, const uint8_t *s, __m512i *even, __m512i *odd) {
  __m512i values = join(tables.mxfp4[s[0]], tables.mxfp4[s[1]]);
  __m512i words = _mm512_cvtepu8_epi16(codes);
  *even = _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(words, c->nibble, c->half, 0xea), values);
  *odd = _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi16(words, 4), c->half), values);
}
FN __m512i e4m3_32(const constants *c, __m256i codes) {
  __m512i words = _mm512_cvtepu8_epi16(codes);
  __m512i below = _mm512_permutex2var_epi16(c->magnitude[0], words, c->magnitude[1]);
  __m512i above = _mm512_permutex2var_epi16(c->magnitude[2], words, c->magnitude[3]);
  __m512i value = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(words, _mm512_set1_epi16(0x40)), below, above);
  return _mm512_ternarylogic_epi32(value, _mm512_slli_epi16(words, 8), _mm512_set1_epi16((short)0x8000), 0xf8);
}

/* 64 elements of a row as BF16, in the order of the sums, from element `at` on; of a tail, `left` of them exist. */
FN void bf16_64(const constants *c, const int format, const int is_tail, const uint8_t *codes, const uint8_t *scale,
                int64_t at, int64_t left, __m512i *first, __m512i *second) {
  if (format == NYB_WEIGHT_NVFP4 || format == NYB_WEIGHT_MXFP4) {
    const int block = format == NYB_WEIGHT_NVFP4 ? 16 : 32;
    const uint8_t *s = scale + at / block;
    uint8_t last[4] = {0, 0, 0, 0};
    __m256i bytes;
    if (!is_tail) bytes = _mm256_loadu_si256((const __m256i *)(codes + at / 2));
    else {
      bytes = _mm256_maskz_loadu_epi8((1u << left / 2) - 1, codes + at / 2);
      for (int i = 0; i < left / block; i++) last[i] = s[i];
      s = last; /* code 0 is 0 under scale 0 */
    }
    if (format == NYB_WEIGHT_NVFP4) nvfp4_64(c, bytes, s, first, second);
    else mxfp4_64(c, bytes, s, first, second);
  } else if (format == NYB_WEIGHT_BF16) {
    const uint8_t *p = codes + 2 * at;
    if (!is_tail) {
      *first = _mm512_loadu_si512(p);
      *second = _mm512_loadu_si512(p + 64);
    } else {
      *first = _mm512_maskz_loadu_epi16(left >= 32 ? ~0u : (1u << left) - 1, p);
      *second = _mm512_maskz_loadu_epi16(left <= 32 ? 0 : (1u << (left - 32)) - 1, p + 64);
    }
  } else {
    const uint8_t *p = codes + at;
    if (!is_tail) {
      *first = e4m3_32(c, _mm256_loadu_si256((const __m256i *)p));
      *second = e4m3_32(c, _mm256_loadu_si256((const __m256i *)(p + 32)));
    } else {
      *first = e4m3_32(c, _mm256_maskz_loadu_epi8(left >= 32 ? ~0u : (1u << left) - 1, p));
      *second = e4m3_32(c, _mm256_maskz_loadu_epi8(left <= 32 ? 0 : (1u << (left - 32)) - 1, p + 32));
    }
  }
}

FN const uint8_t *row_scales(const nyb_segment *s, int64_t row, int64_t k) {
  if (s->format == NYB_WEIGHT_NVFP4) return s->scale + row * (k / 16);
  if (s->format == NYB_WEIGHT_MXFP4) return s->scale + row * (k / 32);
  if (s->format == NYB_WEIGHT_FP8_BLOCK) return block_scales(s, row, k);
  return s->scale;
}

FN void store_float_32(float *out, __m512i bf16, __m512 scale) {
  __m512i low = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(bf16)), 16);
  __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(bf16, 1)), 16);
  _mm512_store_ps(out, _mm512_mul_ps(_mm512_castsi512_ps(low), scale));
  _mm512_store_ps(out + 16, _mm512_mul_ps(_mm512_castsi512_ps(high), scale));
}

FN void decode_as(const int format, const int is_bf16, const nyb_segment *s, int64_t row, int64_t from, int64_t to,
                  int64_t k, void *out) {
  const constants c = load_constants();
  const uint8_t *codes = s->codes + row * s->row_bytes, *scale = row_scales(s, row, k);
  const int has_scales = format == NYB_WEIGHT_FP8_BLOCK;
  for (int64_t at = from; at < to; at += 64) {
    __m512i first, second;
    if (at + 64 <= k) bf16_64(&c, format, 0, codes, scale, at, 64, &first, &second);
    else bf16_64(&c, format, 1, codes, scale, at, k - at, &first, &second);
    if (is_bf16) {
      uint16_t *o = (uint16_t *)out + (at - from);
      _mm512_store_si512(o, first);
      _mm512_store_si512(o + 32, second);
    } else {
      float *o = (float *)out + (at - from);
      __m512 each = _mm512_set1_ps(has_scales ? load_float(scale + at / SCALE_BLOCK * 4) : 1);
      store_float_32(o, first, each);
      store_float_32(o + 32, second, each);
    }
  }
}

/* Plain float weights, only ever multiplied as floats. */
FN void decode_float(const int is_half, const uint8_t *codes, int64_t from, int64_t to, int64_t k, float *out) {
  for (int64_t at = from; at < to; at += 16) {
    int64_t left = k - at;
    __mmask16 m = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
    __m512 v = is_half ? _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, codes + 2 * at))
                       : _mm512_maskz_loadu_ps(m, codes + 4 * at);
    _mm512_store_ps(out + (at - from), v);
  }
}

#define DECODE(name, is_bf16)                                                                                          \
  static __attribute__((target(WIDE))) void name(const nyb_segment *s, int64_t row, int64_t from, int64_t to,         \
                                                 int64_t k, void *out) {                                               \
    const uint8_t *codes = s->codes + row * s->row_bytes;                                                              \
    to = from + (to - from + 63) / 64 * 64;                                                                            \
    switch (s->format) {                                                                                               \
      case NYB_WEIGHT_NVFP4: decode_as(NYB_WEIGHT_NVFP4, 0, s, row, from, to, k, out); break; /* floats alone */       \
      case NYB_WEIGHT_MXFP4: decode_as(NYB_WEIGHT_MXFP4, 0, s, row, from, to, k, out); break;                          \
      case NYB_WEIGHT_BF16: decode_as(NYB_WEIGHT_BF16, is_bf16, s, row, from, to, k, out); break;                      \
      case NYB_WEIGHT_F16: decode_float(1, codes, from, to, k, out); break;                                            \
      case NYB_WEIGHT_F32: decode_float(0, codes, from, to, k, out); break;                                            \
      case NYB_WEIGHT_FP8_BLOCK: decode_as(NYB_WEIGHT_FP8_BLOCK, is_bf16, s, row, from, to, k, out); break;            \
      default: decode_as(NYB_WEIGHT_FP8, is_bf16, s, row, from, to, k, out);                                           \
    }                                                                                                                  \
  }
DECODE(decode_bf16_avx512, 1)
DECODE(decode_float_avx512, 0)
#undef DECODE

/* Nearest BF16, ties to even, as the low halves of 32-bit lanes; NaN stays one. */
FN __m512i round_16(__m512 v) {
  __m512i b = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(b, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0));
}

FN __m512 load_16(const void *x, int x_is_bf16, int64_t at, int64_t k) {
  int64_t left = k - at;
  __mmask16 m = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
  if (!x_is_bf16) return _mm512_maskz_loadu_ps(m, (const float *)x + at);
  __m256i h = _mm256_maskz_loadu_epi16(m, (const uint16_t *)x + at);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

static __attribute__((target(WIDE ",avx512bf16"))) void pack_bf16_avx512(const void *x, int x_is_bf16, int64_t k,
                                                                         int rounded, int is_split, void *out) {
  (void)rounded;
  const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                        22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
  uint16_t *o = out;
  for (int64_t at = 0; at < k; at += 64, o += 64) {
    __m512 v[4];
    for (int i = 0; i < 4; i++) v[i] = load_16(x, x_is_bf16, at + 16 * i, k);
    __m512i a = (__m512i)_mm512_cvtne2ps_pbh(v[1], v[0]), b = (__m512i)_mm512_cvtne2ps_pbh(v[3], v[2]);
    _mm512_store_si512(o, is_split ? _mm512_permutex2var_epi16(a, even, b) : a);
    _mm512_store_si512(o + 32, is_split ? _mm512_permutex2var_epi16(a, odd, b) : b);
  }
}

static __attribute__((target(WIDE))) void pack_float_avx512(const void *x, int x_is_bf16, int64_t k, int rounded,
                                                            int is_split, void *out) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  float *o = out;
  for (int64_t at = 0; at < k; at += 64, o += 64) {
    __m512 v[4];
    for (int i = 0; i < 4; i++) {
      v[i] = load_16(x, x_is_bf16, at + 16 * i, k);
      if (rounded) v[i] = _mm512_castsi512_ps(_mm512_slli_epi32(round_16(v[i]), 16));
    }
    for (int i = 0; i < 4; i++) {
      __m512 a = v[i / 2 * 2], b = v[i / 2 * 2 + 1];
      if (is_split) _mm512_store_ps(o + i / 2 * 16 + i % 2 * 32, _mm512_permutex2var_ps(a, i % 2 ? odd : even, b));
      else _mm512_store_ps(o + 16 * i, v[i]);
    }
  }
}

/* The lanes of several vectors of sums, each vector's added: lane l + 8, then + 4, + 2, + 1. Two vectors at a time: one
 * takes what stays in its place from both, the other what has to move, so that an addition costs one permutation. */
FN __m512 add_halves(__m512 a, __m512 b) { /* eight sums in each half: a, b */
  return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_shuffle_f32x4(a, b, 0x4e));
}
FN __m512 add_quarters(__m512 ab, __m512 cd) { /* four sums in each quarter: a, c, b, d */
  const __m512i moved = _mm512_set_epi32(27, 26, 25, 24, 15, 14, 13, 12, 19, 18, 17, 16, 7, 6, 5, 4);
  return _mm512_add_ps(_mm512_mask_blend_ps(0xf0f0, ab, cd), _mm512_permutex2var_ps(ab, moved, cd));
}
FN __m512 add_pairs(__m512 q, __m512 r) { /* in each quarter two sums of q, two of r */
  __m512d a = _mm512_castps_pd(q), b = _mm512_castps_pd(r);
  return _mm512_add_ps(_mm512_mask_blend_ps(0xcccc, q, r), _mm512_castpd_ps(_mm512_shuffle_pd(a, b, 0x55)));
}
FN __m512 add_singles(__m512 p, __m512 q) { /* in each quarter the sums of p, q, p, q */
  const __m512i moved = _mm512_set_epi32(30, 15, 28, 13, 26, 11, 24, 9, 22, 7, 20, 5, 18, 3, 16, 1);
  return _mm512_add_ps(_mm512_mask_blend_ps(0xaaaa, p, q), _mm512_permutex2var_ps(p, moved, q));
}
/* Four sums of each of a, b, c, d in quarters, in this order. */
FN __m512 reduce_4(__m512 a, __m512 b, __m512 c, __m512 d) {
  return add_quarters(add_halves(a, c), add_halves(b, d));
}

#undef FN

#define NYB_BF16 1
#include "panel.h"
#undef NYB_BF16
#define NYB_BF16 0
#include "panel.h"
#undef NYB_BF16
#undef WIDE
#endif
