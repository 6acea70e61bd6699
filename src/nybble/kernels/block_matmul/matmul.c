/* The driver of the matmul kernels: packs x, divides the work, walks tiles. See matmul.h for the order of the sums. */
#define _DEFAULT_SOURCE /* madvise */
#include "matmul.h"

#include <stdatomic.h>
#include <stdlib.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../isa.h"
#include "../pool.h"
#include "../program.h"
#include "tables.h"

/* GCC's first scheduling pass would move loads up until the sums of a tile no longer fit the registers. */
#if defined(__GNUC__) && !defined(__clang__)
#define UNSCHEDULED __attribute__((optimize("no-schedule-insns")))
#else
#define UNSCHEDULED
#endif

static const float e2m1_values[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

#define SMALLEST_SCALE 0x1p-120f /* of INT8 blocks: below, floats have no room for its product with a weight's scale */

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

#include "pack_blocks.h"
#include "blocks_plain.h"
#if defined(__x86_64__)
/* Weight rows that the kernels of blocks.h work on together: from `first` on, `apart` (0 or 1) from each other; the
 * outputs of those in the mask `valid` are asked for. */
typedef struct {
  int64_t first;
  int apart;
  unsigned valid;
} window;

/* The window of `size` rows at *row, which moves on. At the end of a weight it begins earlier, as nothing may be read
 * past the end; a weight of fewer rows is taken row by row. */
static window next_window(const task *t, int64_t *row, int size) {
  const int64_t at = *row, left = t->end - at, all = t->segment->rows;
  window w = {at, 1, (1u << (left < size ? left : size)) - 1};
  *row += size;
  if (at + size <= all) return w;
  if (all >= size) return (window){all - size, 1, w.valid << (at + size - all)};
  *row = at + 1;
  return (window){at, 0, 1};
}

/* If a row has a NaN among its scales. */
static int has_nan(const nyb_segment *s, int64_t row, int64_t k) {
  const int is_mx = s->format == NYB_WEIGHT_MXFP4;
  const int64_t count = k / (is_mx ? 32 : 16);
  for (const uint8_t *p = s->scale + row * count, *end = p + count; p < end; p++)
    if (is_mx ? *p == 255 : (*p & 127) == 127) return 1;
  return 0;
}
/* Scales and biases of a window's rows. A NaN among a row's block scales makes its scale one: only odd windows may have
 * any. */
static void describe_window(const task *t, const window *w, int rows, int is_odd, float scale[8], float bias[8]) {
  const nyb_segment *s = t->segment;
  for (int j = 0; j < 8; j++) {
    scale[j] = s->tensor_scale;
    bias[j] = -0.0f;
  }
  if (!is_odd && !s->bias) return;
  for (int j = 0; j < rows; j++) {
    const int64_t row = w->first + j * w->apart;
    bias[j] = row_bias(s, row);
    if (is_odd && has_nan(s, row, t->k)) scale[j] = NAN;
  }
}

#define NYB_SUFFIX bf16_wide
#define NYB_WIDE 1
#define NYB_INT8 0
#include "blocks.h"
#define NYB_SUFFIX int8_wide
#define NYB_WIDE 1
#define NYB_INT8 1
#include "blocks.h"
#define NYB_SUFFIX int8_avx2
#define NYB_WIDE 0
#define NYB_INT8 1
#include "blocks.h"
#endif

static const engine portable = {X_FLOAT, 4, 64, 256, 0.4, 0.25, pack_portable, NULL,
                                decode_portable, multiply_portable, NULL};
static const engine portable_int8 = {X_INT8_BLOCKS, 4, 64, INT8_CHUNK, 1, 0.3, pack_int8_portable, run_blocks_portable,
                                     NULL, NULL, NULL};
#if defined(__x86_64__)
static const engine avx2 = {X_FLOAT, 4, 64, 256, 0.3, 0.07, pack_avx2, NULL, decode_avx2, multiply_avx2, NULL};
static const engine avx2_int8 = {X_INT8_BLOCKS, 4, 64, INT8_CHUNK, 0.15, 0.04, pack_int8_avx2, run_blocks_int8_avx2,
                                 NULL, NULL, NULL};
static const engine avx512 = {X_FLOAT, 6, 64, 256, 0.15, 0.036, pack_float_avx512, NULL,
                              decode_float_avx512, multiply_float, NULL};
static const engine avx512_int8 = {X_INT8_BLOCKS, 8, 128, 2 * INT8_CHUNK, 0.06, 0.013, pack_int8_avx512,
                                   run_blocks_int8_wide, NULL, NULL, NULL};
static const engine avx512bf16 = {X_BF16, 6, 64, 128, 0.15, 0.017, pack_bf16_avx512, NULL,
                                  decode_bf16_avx512, multiply_bf16, few_avx512};
static const engine avx512bf16_blocks = {X_BF16_BLOCKS, 8, 128, 2 * BF16_CHUNK, 0.07, 0.018, pack_bf16_blocks,
                                         run_blocks_bf16_wide, NULL, NULL, NULL};
#endif

static int is_packed(int format) { return format == NYB_WEIGHT_NVFP4 || format == NYB_WEIGHT_MXFP4; }

static const engine *choose_engine(int isa, int precision, int format) {
  const int is_int8 = precision == NYB_PRECISION_INT8 && is_packed(format);
#if defined(__x86_64__)
  const int is_exact = precision == NYB_PRECISION_F32 || format == NYB_WEIGHT_F16 || format == NYB_WEIGHT_F32;
  if (is_int8 && isa >= NYB_ISA_AVX512) return &avx512_int8;
  if (is_int8 && isa >= NYB_ISA_AVX2) return &avx2_int8;
  if (isa >= NYB_ISA_AVX512BF16 && !is_exact) return is_packed(format) ? &avx512bf16_blocks : &avx512bf16;
  if (isa >= NYB_ISA_AVX512) return &avx512;
  if (isa >= NYB_ISA_AVX2) return &avx2;
#endif
  (void)isa;
  return is_int8 ? &portable_int8 : &portable;
}

static int kind_of(const engine *e, int format) {
  return e->kind == X_FLOAT && is_packed(format) ? X_FLOAT_SPLIT : e->kind;
}

/* Packed rows of x. */
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

/* Units [next, end) of a thread, neighbours in memory; who has done its own takes those of others. */
typedef struct {
  _Alignas(64) _Atomic int64_t next;
  int64_t end;
} lane;

typedef struct {
  const void *x;
  int64_t x_stride, m, k, n;
  int x_is_bf16, precision, isa, lane_count;
  float *y;
  packed packs[X_KINDS];
  const unit *units;
  lane *lanes;
} call;

enum { PACK_ROWS = 16 };

static void pack_rows(void *context, int64_t index) {
  const call *c = context;
  int64_t end = (index + 1) * PACK_ROWS < c->m ? (index + 1) * PACK_ROWS : c->m;
  for (int kind = 0; kind < X_KINDS; kind++) {
    const packed *p = &c->packs[kind];
    if (!p->rows) continue;
    for (int64_t i = index * PACK_ROWS; i < end; i++)
      p->with->pack((const char *)c->x + i * c->x_stride * (c->x_is_bf16 ? 2 : 4), c->x_is_bf16, c->k,
                    c->precision != NYB_PRECISION_F32, kind == X_FLOAT_SPLIT, p->rows + i * p->stride);
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

static void run_tiles(const task *t, const engine *e) {
  _Alignas(64) char tile[TILE_ROWS * TILE_STRIDE];
  _Alignas(64) float sums[BLOCK_ROWS * TILE_ROWS * 16];
  float tile_scales[TILE_BYTES / 2 / SCALE_BLOCK][8] = {{0}};
  const nyb_segment *s = t->segment;
  const int is_bf16 = e->kind == X_BF16;
  const int64_t bytes = is_bf16 ? 2 : 4, piece = TILE_BYTES / bytes;
  product p = {.tile = tile, .x_stride = t->x_stride, .rows = t->rows, .sums = sums, .n = t->n};
  if (is_bf16 && s->format == NYB_WEIGHT_FP8_BLOCK) p.block_scales = (const float(*)[8])tile_scales;
  for (int64_t row = t->row; row < t->end; row += e->tile_rows) {
    describe_tile(&p, s, row, t->end, e, tile);
    p.y = t->y + row;
    for (int64_t from = 0; from < t->k; from += piece) {
      int64_t to = from + piece < t->k ? from + piece : t->k;
      for (int j = 0; j < p.valid; j++) {
        e->decode(s, row + j, from, to, t->k, tile + j * TILE_STRIDE);
        if (!p.block_scales) continue;
        const uint8_t *scales = block_scales(s, row + j, t->k);
        for (int64_t b = from / SCALE_BLOCK; b * SCALE_BLOCK < to; b++)
          tile_scales[b - from / SCALE_BLOCK][j] = load_float(scales + 4 * b);
      }
      p.x = t->x + from * bytes;
      p.bytes = (to - from + 63) / 64 * 64 * bytes;
      p.is_first = from == 0;
      p.is_last = to == t->k;
      e->multiply(&p);
    }
  }
}

static void run_unit(const call *c, const unit *u) {
  const engine *e = choose_engine(c->isa, c->precision, u->segment->format);
  const packed *x = &c->packs[kind_of(e, u->segment->format)];
  const task t = {u->segment, u->row, u->end, c->k, x->rows + u->first * x->stride, x->stride, u->rows,
                  c->y + u->first * c->n + u->segment->column, c->n};
  if (e->run) e->run(&t);
  else if (u->has_few && e->few) e->few(&t);
  else run_tiles(&t, e);
}

static void run_lane(void *context, int64_t index) {
  const call *c = context;
  for (int i = 0; i < c->lane_count; i++) {
    lane *l = c->lanes + (index + i) % c->lane_count;
    int64_t at;
    while ((at = atomic_fetch_add_explicit(&l->next, 1, memory_order_relaxed)) < l->end) run_unit(c, c->units + at);
  }
}

/* Rough cycles of one weight row with so many rows of x: to divide the work evenly, never to decide results. */
static double row_cost(const engine *e, int64_t k, int64_t rows) {
  return (double)k * (e->decode_cost + (double)rows * e->x_cost);
}

/* Rows of x that a block has: they stay in the second cache; where sums wait between pieces of K, also few enough. */
static int64_t block_rows(const engine *e, int64_t k, int64_t stride, int64_t rows) {
  int64_t most = e->run ? BLOCK_ROWS : CACHE_BYTES / stride < 16 ? 16 : CACHE_BYTES / stride;
  if (k * e->chunk_bytes / e->chunk > TILE_BYTES && most > BLOCK_ROWS) most = BLOCK_ROWS;
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
      const engine *e = choose_engine(c->isa, c->precision, s->format);
      const int64_t block = block_rows(e, c->k, c->packs[kind_of(e, s->format)].stride, rows);
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
               int64_t x_stride, int x_is_bf16, int64_t m, int64_t k, float *y, int64_t n, int precision, int isa,
               int threads) {
  if (!counts) counts = &m;
  pthread_once(&tables_once, make_tables);
  call c = {.x = x, .x_stride = x_stride, .m = m, .k = k, .n = n, .x_is_bf16 = x_is_bf16, .precision = precision,
            .isa = isa, .y = y};
  double work = 0;
  int64_t bytes = 0;
  for (int64_t g = 0; g < groups; g++)
    for (int64_t i = first[g]; counts[g] && i < first[g + 1]; i++) {
      const engine *e = choose_engine(isa, precision, segments[i].format);
      packed *p = &c.packs[kind_of(e, segments[i].format)];
      work += row_cost(e, k, counts[g]) * (double)segments[i].rows;
      if (p->with) continue;
      p->with = e;
      p->stride = (k + e->chunk - 1) / e->chunk * e->chunk_bytes;
      if (p->stride % 4096 == 0) p->stride += 64; /* else a column of x would lie in one set of the cache */
      bytes += (p->stride * m + 4095) / 4096 * 4096;
    }
  double target = work / (threads * 8);
  target = target < 16e3 ? 16e3 : target > 400e3 ? 400e3 : target;
  const int64_t count = divide(&c, segments, first, counts, groups, target, NULL);
  c.lane_count = (int)(threads < count ? threads : count);
  char *memory = scratch((size_t)bytes + (size_t)c.lane_count * sizeof(lane) + (size_t)count * sizeof(unit));
  if (!memory) return 1;
  for (int kind = 0; kind < X_KINDS; kind++) {
    packed *p = &c.packs[kind];
    if (!p->with) continue;
    p->rows = memory;
    memory += (p->stride * m + 4095) / 4096 * 4096;
  }
  c.lanes = (lane *)memory;
  for (int i = 0; i < c.lane_count; i++) {
    atomic_init(&c.lanes[i].next, count * i / c.lane_count);
    c.lanes[i].end = count * (i + 1) / c.lane_count;
  }
  unit *units = (unit *)(c.lanes + c.lane_count);
  divide(&c, segments, first, counts, groups, target, units);
  c.units = units;
  prefer_large_pages(y, (size_t)(m * n) * sizeof *y);
  nyb_parallel(pack_rows, &c, (m + PACK_ROWS - 1) / PACK_ROWS, m * k < 1 << 16 ? 1 : threads);
  nyb_parallel(run_lane, &c, c.lane_count, threads);
  return 0;
}

NYB_STEP(nyb_matmul) {
  return nyb_matmul(v[0].p, v[1].p, v[2].p, v[3].n, v[4].p, v[5].n, (int)v[6].n, v[7].n, v[8].n, v[9].p, v[10].n,
                    (int)v[11].n, (int)v[12].n, (int)v[13].n);
}
