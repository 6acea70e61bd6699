/* Rows of a block format as the nearest BF16 numbers, ties to even, every NaN as 0x7FC0. The products are those of
 * formats/tensor.py, each rounded once in float32; the definition beside it is reference.py. */
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../isa.h"

enum { NVFP4 = 0, MXFP4 = 1, FP8 = 2 }; /* FORMATS of cpu.py */

static inline __attribute__((always_inline)) uint16_t nearest(float value) {
  uint32_t b;
  memcpy(&b, &value, 4);
  uint32_t rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16, is_nan = 0 - (uint32_t)((b & 0x7fffffff) > 0x7f800000);
  return (uint16_t)((0x7fc0 & is_nan) | (rounded & ~is_nan));
}

/* Masks instead of branches: compilers make vectors of it. Nothing here is a subnormal, which some machines are slow
 * at. */
static inline __attribute__((always_inline)) float e4m3(uint8_t code) {
  uint32_t magnitude = code & 0x7f, is_small = 0 - (uint32_t)(magnitude < 8), small, wide;
  float least = (float)(int32_t)magnitude * 0x1p-9f, value;
  memcpy(&small, &least, 4);
  wide = (magnitude << 20) + (120u << 23);
  wide = (small & is_small) | (wide & ~is_small);
  wide |= (0 - (uint32_t)(magnitude == 0x7f)) & 0x7fc00000;
  wide |= (uint32_t)(code & 0x80) << 24;
  memcpy(&value, &wide, 4);
  return value;
}

static float e8m0(int code) {
  uint32_t wide = code == 255 ? 0x7fc00000 : code ? (uint32_t)code << 23 : 0x00400000; /* 0 means 2^-127 */
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

/* Each of the 256 block scales times each of the 16 codes: the numbers, and their bytes apart. */
typedef struct {
  uint16_t value[256][16];
  uint8_t low[256][16], high[256][16];
} products;

static void multiply(products *p, int format, float tensor_scale) {
  static const float codes[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -.5f, -1, -1.5f, -2, -3, -4, -6};
  for (int s = 0; s < 256; s++) {
    float scale = format == NVFP4 ? e4m3((uint8_t)s) * tensor_scale : e8m0(s);
    for (int c = 0; c < 16; c++) {
      uint16_t bits = nearest(codes[c] * scale);
      p->value[s][c] = bits;
      p->low[s][c] = (uint8_t)bits;
      p->high[s][c] = (uint8_t)(bits >> 8);
    }
  }
}

/* `runs` of eight code bytes; two runs share a scale in MXFP4, which `shift` says. */
static void look_up_portable(const products *p, const uint8_t *codes, const uint8_t *scale, int64_t runs, int shift,
                             uint16_t *out) {
  for (int64_t r = 0; r < runs; r++) {
    const uint16_t *row = p->value[scale[r >> shift]];
    for (int i = 0; i < 8; i++) {
      uint8_t both = codes[8 * r + i];
      out[16 * r + 2 * i] = row[both & 15];
      out[16 * r + 2 * i + 1] = row[both >> 4];
    }
  }
}

/* FP8 codes under one scale. */
#define FLOATS                                                                                   \
  for (int64_t i = 0; i < n; i++) out[i] = nearest(e4m3(codes[i]) * scale);

static void floats_portable(const uint8_t *codes, float scale, int64_t n, uint16_t *out) { FLOATS }

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void look_up_avx2(const products *p, const uint8_t *codes, const uint8_t *scale,
                                                         int64_t runs, int shift, uint16_t *out) {
  const __m128i nibble = _mm_set1_epi8(15);
  for (int64_t r = 0; r < runs; r++) {
    uint8_t s = scale[r >> shift];
    __m128i both = _mm_loadl_epi64((const __m128i *)(codes + 8 * r));
    __m128i first = _mm_and_si128(both, nibble), second = _mm_and_si128(_mm_srli_epi16(both, 4), nibble);
    __m128i at = _mm_unpacklo_epi8(first, second);
    __m128i low = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)p->low[s]), at);
    __m128i high = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)p->high[s]), at);
    _mm_storeu_si128((__m128i *)(out + 16 * r), _mm_unpacklo_epi8(low, high));
    _mm_storeu_si128((__m128i *)(out + 16 * r + 8), _mm_unpackhi_epi8(low, high));
  }
}

__attribute__((target("avx2"))) static void floats_avx2(const uint8_t *codes, float scale, int64_t n, uint16_t *out) {
  FLOATS
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) static void floats_avx512(const uint8_t *codes,
                                                                                        float scale, int64_t n,
                                                                                        uint16_t *out) {
  FLOATS
}
#endif

static void look_up(const products *p, const uint8_t *codes, const uint8_t *scale, int64_t runs, int shift,
                    uint16_t *out, int isa) {
#if defined(__x86_64__)
  if (isa >= NYB_ISA_AVX2) {
    look_up_avx2(p, codes, scale, runs, shift, out);
    return;
  }
#endif
  (void)isa;
  look_up_portable(p, codes, scale, runs, shift, out);
}

static void floats(const uint8_t *codes, float scale, int64_t n, uint16_t *out, int isa) {
#if defined(__x86_64__)
  if (isa >= NYB_ISA_AVX512) {
    floats_avx512(codes, scale, n, out);
    return;
  }
  if (isa >= NYB_ISA_AVX2) {
    floats_avx2(codes, scale, n, out);
    return;
  }
#endif
  (void)isa;
  floats_portable(codes, scale, n, out);
}

/* Four-bit codes [count / 2] with one scale byte per 16 (NVFP4) or 32 (MXFP4) of `count` elements. Both functions work
 * on the calling thread alone: callers write files in threads of theirs. */
void nyb_decode_packed(const uint8_t *codes, const uint8_t *scale, float tensor_scale, int64_t count, int format,
                       uint16_t *out, int isa) {
  products p;
  multiply(&p, format, tensor_scale);
  look_up(&p, codes, scale, count / 16, format == MXFP4, out, isa);
}

/* FP8 codes [rows, k] with scales [rows / height, k / width], both rounded up. */
void nyb_decode_fp8(const uint8_t *codes, const float *scale, int64_t rows, int64_t k, int64_t height, int64_t width,
                    uint16_t *out, int isa) {
  int64_t across = (k + width - 1) / width;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t b = 0; b < across; b++) {
      int64_t at = b * width, n = k - at < width ? k - at : width;
      floats(codes + r * k + at, scale[r / height * across + b], n, out + r * k + at, isa);
    }
}
