/* The driver of the matmul kernels: packs x, divides the work, walks tiles. See matmul.h for the order of the sums. */
#define _DEFAULT_SOURCE /* madvise */
#include "matmul.h"

#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../isa.h"
#include "../pool.h"
#include "tables.h"

/* GCC's first scheduling pass would move loads up until the sums of a tile no longer fit the registers. */
#if defined(__GNUC__) && !defined(__clang__)
#define UNSCHEDULED __attribute__((optimize("no-schedule-insns")))
#else
#define UNSCHEDULED
#endif

static const float e2m1_values[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

static inline float row_scale(const nyb_segment *s, int64_t row) {
  return s->format == NYB_WEIGHT_FP8_CHANNEL ? load_float(s->scale + 4 * row) : s->tensor_scale;
}

/* Of FP8_BLOCK: the float scales along K of a row's blocks. */
static inline const uint8_t *block_scales(const nyb_segment *s, int64_t row, int64_t k) {
  return s->scale + row / SCALE_BLOCK * ((k + SCALE_BLOCK - 1) / SCALE_BLOCK) * 4;
}

static inline float row_bias(const nyb_segment *s, int64_t row) {
  return s->bias ? load_float((const uint8_t *)(s->bias + row)) : -0.0f; /* adding -0 changes nothing */
}

static inline float float_of_half(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude < 0x400) return float_of(sign | bits_of((float)magnitude * 0x1p-24f));
  return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

static inline float round_to_bf16(float v) {
  uint32_t b = bits_of(v), r = (b + 0x7fff + (b >> 16 & 1)) & 0xffff0000u;
  return float_of(v == v ? r : 0x7fc00000u);
}

#include "avx512.h"

#define NYB_AVX2 0
#include "plain.h"
#undef NYB_AVX2
#if defined(__x86_64__)
#define NYB_AVX2 1
#include "plain.h"
#undef NYB_AVX2
#endif

static const engine portable = {0, 4, decode_portable, multiply_portable, NULL, pack_portable};
#if defined(__x86_64__)
static const engine avx2 = {0, 4, decode_avx2, multiply_avx2, NULL, pack_avx2};
static const engine avx512 = {0, 6, decode_float_avx512, multiply_float, NULL, pack_float_avx512};
static const engine avx512bf16 = {1, 6, decode_bf16_avx512, multiply_bf16, few_avx512, pack_bf16_avx512};
#endif

static const engine *choose_engine(int isa, int rounded, int format) {
#if defined(__x86_64__)
  int is_exact = format == NYB_WEIGHT_F16 || format == NYB_WEIGHT_F32;
  if (isa >= NYB_ISA_AVX512BF16 && rounded && !is_exact) return &avx512bf16;
  if (isa >= NYB_ISA_AVX512) return &avx512;
  if (isa >= NYB_ISA_AVX2) return &avx2;
#endif
  (void)isa, (void)rounded, (void)format;
  return &portable;
}

/* Packed rows of x: for BF16 and for float operands, in natural order and split. */
typedef struct {
  char *rows; /* NULL: no weight needs it */
  int64_t stride;
  const engine *with;
} packed;

/* Weight rows [row, end) of a segment times rows [first, first + rows) of x; has_few: of a group of few rows. */
typedef struct {
  const nyb_segment *segment;
  int64_t row, end, first, rows;
  int has_few;
} unit;

typedef struct {
  const void *x;
  int64_t x_stride, m, k, n;
  int x_is_bf16, rounded, isa;
  float *y;
  packed packs[2][2]; /* [BF16 operands][split] */
  const unit *units;
} call;

enum { PACK_ROWS = 16, CACHE_BYTES = 1 << 19 /* of x in a block: half of the second cache */ };

static int is_split(int format) { return format == NYB_WEIGHT_NVFP4 || format == NYB_WEIGHT_MXFP4; }

static void pack_rows(void *context, int64_t index) {
  const call *c = context;
  int64_t end = (index + 1) * PACK_ROWS < c->m ? (index + 1) * PACK_ROWS : c->m;
  for (int kind = 0; kind < 4; kind++) {
    const packed *p = &c->packs[kind >> 1][kind & 1];
    if (!p->rows) continue;
    for (int64_t i = index * PACK_ROWS; i < end; i++)
      p->with->pack((const char *)c->x + i * c->x_stride * (c->x_is_bf16 ? 2 : 4), c->x_is_bf16, c->k, c->rounded,
                    kind & 1, p->rows + i * p->stride);
  }
}

/* Scales and biases of the tile's rows; rows that do not exist are zeros and are not stored. */
static void describe_tile(product *p, const nyb_segment *s, int64_t row, int64_t end, const engine *e, char *tile) {
  p->valid = end - row < e->tile_rows ? (int)(end - row) : e->tile_rows;
  for (int j = 0; j < 8; j++) {
    p->scale[j] = j < p->valid ? row_scale(s, row + j) : 0;
    p->bias[j] = j < p->valid ? row_bias(s, row + j) : 0;
  }
  for (int j = p->valid; j < e->tile_rows; j++) memset(tile + j * TILE_STRIDE, 0, TILE_BYTES);
}

static void run_tiles(const call *c, const unit *u, const engine *e, const packed *x) {
  _Alignas(64) char tile[TILE_ROWS * TILE_STRIDE];
  _Alignas(64) float sums[BLOCK_ROWS * TILE_ROWS * 16];
  float tile_scales[TILE_BYTES / 2 / SCALE_BLOCK][8] = {{0}};
  const nyb_segment *s = u->segment;
  const int64_t bytes = e->is_bf16 ? 2 : 4, piece = TILE_BYTES / bytes;
  product p = {.tile = tile, .x_stride = x->stride, .rows = u->rows, .sums = sums, .n = c->n};
  if (e->is_bf16 && s->format == NYB_WEIGHT_FP8_BLOCK) p.block_scales = (const float(*)[8])tile_scales;
  for (int64_t row = u->row; row < u->end; row += e->tile_rows) {
    describe_tile(&p, s, row, u->end, e, tile);
    p.y = c->y + u->first * c->n + s->column + row;
    for (int64_t from = 0; from < c->k; from += piece) {
      int64_t to = from + piece < c->k ? from + piece : c->k;
      for (int j = 0; j < p.valid; j++) {
        e->decode(s, row + j, from, to, c->k, tile + j * TILE_STRIDE);
        if (!p.block_scales) continue;
        const uint8_t *scales = block_scales(s, row + j, c->k);
        for (int64_t b = from / SCALE_BLOCK; b * SCALE_BLOCK < to; b++)
          tile_scales[b - from / SCALE_BLOCK][j] = load_float(scales + 4 * b);
      }
      p.x = x->rows + u->first * x->stride + from * bytes;
      p.bytes = (to - from + 63) / 64 * 64 * bytes;
      p.is_first = from == 0;
      p.is_last = to == c->k;
      e->multiply(&p);
    }
  }
}

static void run_unit(void *context, int64_t index) {
  const call *c = context;
  const unit *u = c->units + index;
  const engine *e = choose_engine(c->isa, c->rounded, u->segment->format);
  const packed *x = &c->packs[e->is_bf16][is_split(u->segment->format)];
  if (u->has_few && e->few)
    e->few(u->segment, u->row, u->end, c->k, x->rows + u->first * x->stride, x->stride, u->rows,
           c->y + u->first * c->n + u->segment->column, c->n);
  else
    run_tiles(c, u, e, x);
}

/* Rough cycles of one weight row with so many rows of x: to divide the work evenly, never to decide results. */
static double row_cost(const engine *e, int64_t k, int64_t rows) {
  return (double)k * (0.15 + (double)rows / (e->is_bf16 ? 60 : 28));
}

/* Rows of x that a block has: they stay in the second cache; where sums wait between pieces of K, also few enough. */
static int64_t block_rows(const engine *e, int64_t k, int64_t stride, int64_t rows) {
  int64_t most = CACHE_BYTES / stride < 16 ? 16 : CACHE_BYTES / stride;
  if (k * (e->is_bf16 ? 2 : 4) > TILE_BYTES && most > BLOCK_ROWS) most = BLOCK_ROWS;
  most = most / 4 * 4;
  int64_t blocks = (rows + most - 1) / most;
  return ((rows + blocks - 1) / blocks + 3) / 4 * 4;
}

/* The units of all groups, into `units` unless it is NULL; returns how many. */
static int64_t divide(const call *c, const nyb_segment *segments, const int64_t *first, const int64_t *counts,
                      int64_t groups, double target, unit *units) {
  int64_t made = 0, start = 0;
  for (int64_t g = 0; g < groups; start += counts[g++]) {
    const int64_t rows = counts[g];
    for (int64_t i = first[g]; rows && i < first[g + 1]; i++) {
      const nyb_segment *s = segments + i;
      const engine *e = choose_engine(c->isa, c->rounded, s->format);
      const int64_t block = block_rows(e, c->k, c->packs[e->is_bf16][is_split(s->format)].stride, rows);
      const int64_t step = e->tile_rows * 4; /* 24 columns or 16: threads seldom share a line of y */
      int64_t chunk = (int64_t)(target / row_cost(e, c->k, block < rows ? block : rows)) / step * step;
      if (chunk < step) chunk = step;
      for (int64_t b = 0; b < rows; b += block)
        for (int64_t row = 0; row < s->rows; row += chunk, made++)
          if (units)
            units[made] = (unit){s, row, row + chunk < s->rows ? row + chunk : s->rows, start + b,
                                 b + block < rows ? block : rows - b, rows <= FEW};
    }
  }
  return made;
}

/* A large output is fresh memory, and a third of the time of a head on 512 rows went into its page faults. */
static void prefer_large_pages(float *y, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t page = 1 << 21, start = ((uintptr_t)y + page - 1) / page * page;
  const uintptr_t end = ((uintptr_t)y + bytes) / page * page;
  if (end > start + 8 * page) madvise((void *)start, end - start, MADV_HUGEPAGE); /* refused: as before */
#else
  (void)y, (void)bytes;
#endif
}

/* Memory that a thread keeps between calls, for packed rows and units. */
static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static void make_key(void) {
  pthread_key_create(&scratch_key, free);
}
static char *scratch(size_t bytes) {
  pthread_once(&scratch_once, make_key);
  size_t *held = pthread_getspecific(scratch_key); /* its first 64 bytes hold its size */
  if (!held || *held < bytes) {
    free(held);
    pthread_setspecific(scratch_key, NULL);
    bytes = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    held = aligned_alloc(4096, bytes + 4096);
    if (!held) return NULL;
    *held = bytes;
    pthread_setspecific(scratch_key, held);
  }
  return (char *)held + 4096;
}

int nyb_matmul(const nyb_segment *segments, const int64_t *first, const int64_t *counts, int64_t groups, const void *x,
               int64_t x_stride, int x_is_bf16, int64_t m, int64_t k, float *y, int64_t n, int rounded, int isa,
               int threads) {
  pthread_once(&tables_once, make_tables);
  call c = {.x = x, .x_stride = x_stride, .m = m, .k = k, .n = n, .x_is_bf16 = x_is_bf16, .rounded = rounded,
            .isa = isa, .y = y};
  double work = 0;
  int64_t bytes = 0;
  for (int64_t g = 0; g < groups; g++)
    for (int64_t i = first[g]; counts[g] && i < first[g + 1]; i++) {
      const engine *e = choose_engine(isa, rounded, segments[i].format);
      packed *p = &c.packs[e->is_bf16][is_split(segments[i].format)];
      work += row_cost(e, k, counts[g]) * (double)segments[i].rows;
      if (p->with) continue;
      p->with = e;
      p->stride = (k + 63) / 64 * 64 * (e->is_bf16 ? 2 : 4);
      if (p->stride % 4096 == 0) p->stride += 64; /* else a column of x would lie in one set of the cache */
      bytes += (p->stride * m + 4095) / 4096 * 4096;
    }
  double target = work / (threads * 8);
  target = target < 16e3 ? 16e3 : target > 400e3 ? 400e3 : target;
  const int64_t count = divide(&c, segments, first, counts, groups, target, NULL);
  char *memory = scratch((size_t)bytes + (size_t)count * sizeof(unit));
  if (!memory) return 1;
  for (int kind = 0; kind < 4; kind++) {
    packed *p = &c.packs[kind >> 1][kind & 1];
    if (!p->with) continue;
    p->rows = memory;
    memory += (p->stride * m + 4095) / 4096 * 4096;
  }
  unit *units = (unit *)memory;
  divide(&c, segments, first, counts, groups, target, units);
  c.units = units;
  prefer_large_pages(y, (size_t)(m * n) * sizeof *y);
  nyb_parallel(pack_rows, &c, (m + PACK_ROWS - 1) / PACK_ROWS, m * k < 1 << 16 ? 1 : threads);
  nyb_parallel(run_unit, &c, count, threads);
  return 0;
}
