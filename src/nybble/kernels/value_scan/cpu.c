/* Counts over the stored values of tensors: NaN, infinities, zeros, signs, saturated values, extremes. Plain loops that
 * every compiler turns into vector code; sums are of integers, so all instruction sets give equal results. The
 * definition beside it is reference.py. */
#include <stdint.h>
#include <string.h>

enum { CODES, E4M3, E8M0, BF16, F16, F32 }; /* KINDS of the package */

typedef struct {
  const uint8_t *data;
  int64_t count; /* elements; bytes for CODES */
  int64_t kind;
} segment;

typedef struct {
  int64_t size, nan, inf, zero, negative, saturated, least, largest;
} counts;

#define SHORT 240  /* bytes: a count of them fits a byte, and they are whole vectors */
#define LONG 4096  /* elements: copied to the stack, so that data need not be aligned */

static inline void widen(counts *c, int64_t least, int64_t largest) {
  if (least < c->least) c->least = least;
  if (largest > c->largest) c->largest = largest;
}

/* One byte each: what counts as NaN, zero and saturated differs, and which bits are the magnitude. */
#define BYTES(NAME, MASK, NAN, SATURATED, SIGN)                              \
  static void NAME(const uint8_t *x, int64_t n, counts *c) {                 \
    for (int64_t at = 0; at < n; at += SHORT) {                              \
      int m = n - at < SHORT ? (int)(n - at) : SHORT;                        \
      const uint8_t *p = x + at;                                             \
      uint8_t nan = 0, zero = 0, negative = 0, saturated = 0;                \
      uint8_t least = 255, largest = 0;                                      \
      for (int i = 0; i < m; i++) {                                          \
        uint8_t v = p[i] & (uint8_t)(MASK);                                  \
        nan += v == (NAN);                                                   \
        zero += v == 0;                                                      \
        saturated += v == (SATURATED);                                       \
        negative += (uint8_t)((p[i] & (uint8_t)(SIGN)) != 0);                \
        least = v < least ? v : least;                                       \
        largest = v > largest ? v : largest;                                 \
      }                                                                      \
      c->nan += nan, c->zero += zero;                                        \
      c->saturated += saturated, c->negative += negative;                    \
      widen(c, least, largest);                                              \
    }                                                                        \
  }

#define NEVER 0xFF /* no byte under that mask */
BYTES(scan_codes, 0x77, NEVER, 0x77, 0)
BYTES(scan_e4m3, 0x7F, 0x7F, 0x7E, 0x80)
BYTES(scan_e8m0, 0xFF, 0xFF, 0xFE, 0)

/* Floats by their bits, a signed integer without the sign: every machine compares those. */
#define FLOATS(NAME, WORD, COUNT, MASK, INFINITE, LARGEST)                   \
  static void NAME(const uint8_t *x, int64_t n, counts *c) {                 \
    WORD part[LONG];                                                         \
    for (int64_t at = 0; at < n; at += LONG) {                               \
      int m = n - at < LONG ? (int)(n - at) : LONG;                          \
      memcpy(part, x + at * (int64_t)sizeof(WORD), (size_t)m * sizeof(WORD)); \
      COUNT nan = 0, inf = 0, zero = 0, negative = 0, saturated = 0;         \
      WORD least = MASK, largest = 0;                                        \
      for (int i = 0; i < m; i++) {                                          \
        WORD v = part[i] & MASK;                                             \
        nan += v > INFINITE;                                                 \
        inf += v == INFINITE;                                                \
        zero += v == 0;                                                      \
        saturated += v == LARGEST;                                           \
        negative += part[i] < 0;                                             \
        least = v < least ? v : least;                                       \
        largest = v > largest ? v : largest;                                 \
      }                                                                      \
      c->nan += nan, c->inf += inf, c->zero += zero;                         \
      c->saturated += saturated, c->negative += negative;                    \
      widen(c, least, largest);                                              \
    }                                                                        \
  }

FLOATS(scan_bf16, int16_t, uint16_t, 0x7FFF, 0x7F80, 0x7F7F)
FLOATS(scan_f16, int16_t, uint16_t, 0x7FFF, 0x7C00, 0x7BFF)
FLOATS(scan_f32, int32_t, uint32_t, 0x7FFFFFFF, 0x7F800000, 0x7F7FFFFF)

/* out[i] are the counts of segments[i]. Works on the calling thread alone: callers read files in threads of theirs. */
void nyb_value_scan(const segment *segments, int64_t count, counts *out) {
  static void (*const scans[])(const uint8_t *, int64_t, counts *) = {
      scan_codes, scan_e4m3, scan_e8m0, scan_bf16, scan_f16, scan_f32};
  for (int64_t i = 0; i < count; i++) {
    counts c = {segments[i].count, 0, 0, 0, 0, 0, INT64_MAX, 0};
    scans[segments[i].kind](segments[i].data, segments[i].count, &c);
    out[i] = c;
  }
}
