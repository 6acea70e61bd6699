/* Tables of decoded values, made once. */
#ifndef NYB_MATMUL_TABLES_H
#define NYB_MATMUL_TABLES_H
#include <math.h>
#include <pthread.h>
#include <string.h>

static struct {
  _Alignas(64) uint16_t nvfp4[256][16]; /* BF16 of E2M1 code times E4M3 scale: exact */
  _Alignas(64) uint16_t mxfp4[256][16]; /* the same with an E8M0 scale */
  _Alignas(64) uint16_t e4m3[128];      /* BF16 of the codes without sign: exact */
  float e4m3_float[256];
} tables;

/* For blocks.h: which of the scale bytes of two rows goes to the top of a lane, [wide][MXFP4]; doubled E2M1 values
 * raised by 12; and E2M1 as BF16, twice. */
#define AT(i) (0x00808080u | (uint32_t)(i) << 24)
static const uint32_t scale_places[2][2][16] = {
    {{AT(0), AT(1), AT(4), AT(5), AT(2), AT(3), AT(6), AT(7),
      AT(4), AT(5), AT(8), AT(9), AT(6), AT(7), AT(10), AT(11)},
     {AT(0), AT(0), AT(2), AT(2), AT(1), AT(1), AT(3), AT(3),
      AT(2), AT(2), AT(4), AT(4), AT(3), AT(3), AT(5), AT(5)}},
    {{AT(0), AT(1), AT(8), AT(9), AT(2), AT(3), AT(10), AT(11),
      AT(4), AT(5), AT(12), AT(13), AT(6), AT(7), AT(14), AT(15)},
     {AT(0), AT(0), AT(4), AT(4), AT(1), AT(1), AT(5), AT(5),
      AT(2), AT(2), AT(6), AT(6), AT(3), AT(3), AT(7), AT(7)}}};
#undef AT
static _Alignas(16) const uint8_t raised_values[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
#define BF16_VALUES                                                                                                    \
  0, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,                                                           \
      0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0
static _Alignas(64) const uint16_t bf16_values[32] = {BF16_VALUES, BF16_VALUES};
#undef BF16_VALUES

static inline float float_of(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
static inline uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}
static inline float load_float(const uint8_t *p) {
  float f;
  memcpy(&f, p, 4);
  return f;
}

static float e4m3_value(unsigned code) {
  unsigned magnitude = code & 127;
  float v = magnitude == 127 ? NAN
            : magnitude < 8  ? ldexpf((float)magnitude, -9)
                             : ldexpf((float)(8 + (magnitude & 7)), (int)(magnitude >> 3) - 10);
  return code & 128 ? -v : v;
}

static void make_tables(void) {
  static const float e2m1[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
  for (unsigned s = 0; s < 256; s++) {
    float small = e4m3_value(s), power = s == 255 ? NAN : ldexpf(1, (int)s - 127);
    tables.e4m3_float[s] = small;
    if (s < 128) tables.e4m3[s] = (uint16_t)(bits_of(small) >> 16);
    for (unsigned c = 0; c < 16; c++) {
      tables.nvfp4[s][c] = (uint16_t)(bits_of(e2m1[c] * small) >> 16);
      tables.mxfp4[s][c] = (uint16_t)(bits_of(e2m1[c] * power) >> 16);
    }
  }
}
static pthread_once_t tables_once = PTHREAD_ONCE_INIT;

#endif
