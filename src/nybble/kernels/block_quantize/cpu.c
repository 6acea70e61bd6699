/* amax, block quantize, decode and compare on a CPU: tiles, instruction sets and entry points.
 * The arithmetic is in quantize.h; the definition beside it is formats/search.py and reference.py. */
#include "cpu.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../pool.h"

#define TILE 65536 /* elements: 128 KiB of BF16, a few tens of microseconds */
#define NYB_MX_ZERO 127 /* a zero MXFP4 block has scale 1 */
#define NYB_MX_MAX 252  /* 6 * 2^125 is a finite float, 4 * 2^126 is not */

static inline float f16_to_float(const void *p) {
  uint16_t h;
  memcpy(&h, p, 2);
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff, wide;
  if (magnitude >= 0x7c00) wide = 0x7f800000 | ((magnitude & 0x3ff) << 13);
  else if (magnitude >= 0x400) wide = (magnitude << 13) + (112u << 23);
  else {
    float f = (float)magnitude * 0x1p-24f;
    memcpy(&wide, &f, 4);
  }
  wide |= sign;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

/* Elements [at, at + n) of a source as float32. */
static inline void widen(const char *source, int64_t at, int n, int dtype, float *out) {
  if (dtype == NYB_F32) {
    memcpy(out, source + at * 4, (size_t)n * 4);
  } else if (dtype == NYB_F16) {
    for (int i = 0; i < n; i++) out[i] = f16_to_float(source + (at + i) * 2);
  } else {
    for (int i = 0; i < n; i++) {
      uint16_t h;
      memcpy(&h, source + (at + i) * 2, 2);
      uint32_t wide = (uint32_t)h << 16;
      memcpy(out + i, &wide, 4);
    }
  }
}

#define NYB_BODY "block_quantize/quantize.h"
#include "../every_isa.h"

/* All tiles of all segments in one list, so that many small matrices and one large one load the threads alike. */
typedef struct {
  const nyb_segment *segments;
  int64_t n;
  int64_t *first_tile; /* [n + 1] */
  int dtype, format, search, isa;
  uint32_t *amax_bits;
  float *const *decoded;
  nyb_comparison *compared;
} job;

static int block_of(int format) { return format == NYB_MXFP4 ? 32 : format == NYB_NVFP4 ? 16 : 1; }

/* The segment of a tile, and its elements [*from, *to). */
static int64_t find(const job *j, int64_t tile, int64_t *from, int64_t *to) {
  int64_t low = 0, high = j->n - 1;
  while (low < high) {
    int64_t middle = (low + high + 1) / 2;
    if (j->first_tile[middle] <= tile) low = middle;
    else high = middle - 1;
  }
  *from = (tile - j->first_tile[low]) * TILE;
  *to = *from + TILE < j->segments[low].count ? *from + TILE : j->segments[low].count;
  return low;
}

static void amax_tile(void *context, int64_t tile) {
  job *j = context;
  int64_t from, to, at = find(j, tile, &from, &to);
  uint32_t most = 0;
  const char *source = j->segments[at].source;
  if (j->isa == NYB_ISA_PORTABLE) most = amax_bits_portable(source, from, to, j->dtype);
#if defined(__x86_64__)
  else if (j->isa == NYB_ISA_AVX2) most = amax_bits_avx2(source, from, to, j->dtype);
  else most = amax_bits_avx512(source, from, to, j->dtype);
#endif
  _Atomic uint32_t *out = (_Atomic uint32_t *)&j->amax_bits[at];
  uint32_t seen = atomic_load(out);
  while (seen < most && !atomic_compare_exchange_weak(out, &seen, most)) {}
}

static void quantize_tile(void *context, int64_t tile) {
  job *j = context;
  int64_t from, to, at = find(j, tile, &from, &to);
  if (j->format == NYB_FP8) {
    CALL(j->isa, encode_fp8, &j->segments[at], from, to, j->dtype);
  } else {
    int block = block_of(j->format);
    CALL(j->isa, quantize_range, &j->segments[at], from / block, to / block, j->dtype, block, j->search);
  }
}

static void decode_tile(void *context, int64_t tile) {
  job *j = context;
  int64_t from, to, at = find(j, tile, &from, &to);
  CALL(j->isa, decode_range, &j->segments[at], from, to, j->format, j->decoded[at] + from);
}

static void compare_tile(void *context, int64_t tile) {
  job *j = context;
  int64_t from, to, at = find(j, tile, &from, &to);
  CALL(j->isa, compare_range, &j->segments[at], from, to, j->dtype, j->format, &j->compared[tile]);
}

static int64_t start(job *j, const nyb_segment *segments, int64_t n) {
  j->segments = segments;
  j->n = n;
  j->first_tile = malloc(sizeof(int64_t) * (size_t)(n + 1));
  if (!j->first_tile) abort();
  int64_t tiles = 0;
  for (int64_t i = 0; i < n; i++) {
    j->first_tile[i] = tiles;
    tiles += (segments[i].count + TILE - 1) / TILE;
  }
  j->first_tile[n] = tiles;
  return tiles;
}

void nyb_amax(const nyb_segment *segments, int64_t n, int dtype, uint32_t *amax_bits, int isa, int threads) {
  job j = {.dtype = dtype, .isa = isa, .amax_bits = amax_bits};
  int64_t tiles = start(&j, segments, n);
  for (int64_t i = 0; i < n; i++) amax_bits[i] = 0;
  nyb_parallel(amax_tile, &j, tiles, threads);
  free(j.first_tile);
}

void nyb_quantize(const nyb_segment *segments, int64_t n, int dtype, int format, int search, int isa, int threads) {
  job j = {.dtype = dtype, .isa = isa, .format = format, .search = search};
  int64_t tiles = start(&j, segments, n);
  nyb_parallel(quantize_tile, &j, tiles, threads);
  free(j.first_tile);
}

void nyb_decode(const nyb_segment *segments, int64_t n, int format, float *const *out, int isa, int threads) {
  job j = {.isa = isa, .format = format, .decoded = out};
  int64_t tiles = start(&j, segments, n);
  nyb_parallel(decode_tile, &j, tiles, threads);
  free(j.first_tile);
}

/* Sums per tile, added up in order afterwards: the same figures for any number of threads. */
void nyb_compare(const nyb_segment *segments, int64_t n, int dtype, int format, nyb_comparison *out, int isa,
                 int threads) {
  job j = {.dtype = dtype, .isa = isa, .format = format};
  int64_t tiles = start(&j, segments, n);
  j.compared = calloc((size_t)tiles + 1, sizeof(nyb_comparison));
  if (!j.compared) abort();
  nyb_parallel(compare_tile, &j, tiles, threads);
  for (int64_t i = 0; i < n; i++) {
    out[i] = (nyb_comparison){0};
    for (int64_t t = j.first_tile[i]; t < j.first_tile[i + 1]; t++) {
      out[i].error += j.compared[t].error;
      out[i].energy += j.compared[t].energy;
      out[i].bad_scales += j.compared[t].bad_scales;
    }
  }
  free(j.compared);
  free(j.first_tile);
}
