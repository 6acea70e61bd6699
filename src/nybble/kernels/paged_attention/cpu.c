/* Attention over pages on a CPU: tiles of queries, segments of keys, instruction sets, entry points. The arithmetic is
 * in tile.h; the definition beside it is reference.py. */
#include "cpu.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../pool.h"

/* The softmax of a row is summed over blocks, those of a segment one after another, then over segments. Both lie at
 * absolute multiples, so that the order does not depend on who works on what; segments share a long decode out. */
#define BLOCK 64
#define SEGMENT 512
#define TILE_ROWS 96 /* rows that share a transposed block of keys: 48 cost 7 %, 192 gain 1 % */

/* Consecutive tokens of one sequence, and one key/value head with the query heads of its group. */
typedef struct {
  const char *keys, *values; /* of page 0 and this head */
  const int32_t *pages;      /* the sequence's row of the table */
  const float *q;            /* of the first token and query head */
  float *out;
  int64_t token_stride;                   /* of q and out, in floats */
  int64_t page_stride, page_tokens;       /* page_stride in elements */
  int64_t position, window;               /* position of the first token */
  int64_t head_dim, stride;               /* stride: head_dim rounded up to whole vectors */
  int tokens, group, is_bf16;
} tile;

typedef struct {
  float *q;       /* [rows][head_dim] */
  float *keys;    /* [head_dim][BLOCK] */
  float *values;  /* [BLOCK][stride] */
  float *scores;  /* [6][BLOCK] */
  float *mixed;   /* [rows][stride] of the segment */
  float *largest; /* [rows] of the segment */
  float *sums;    /* [rows][16] of the segment, by lane */
  float *sum;     /* [rows] of the segment */
  float *total, *total_largest, *total_sum; /* the same over all segments */
  char *nothing;  /* [stride] zeros, for positions that nobody sees */
} scratch;

static inline void widen(const char *source, int64_t at, int n, int is_bf16, float *out) {
  if (!is_bf16) {
    memcpy(out, source + at * 4, (size_t)n * 4);
    return;
  }
  for (int i = 0; i < n; i++) {
    uint16_t h;
    memcpy(&h, source + (at + i) * 2, 2);
    uint32_t wide = (uint32_t)h << 16;
    memcpy(out + i, &wide, 4);
  }
}

/* Where the BLOCK positions from `block` on lie; those outside begin .. end - 1 have no page, or nothing in it yet. */
static void find(const tile *t, const char *base, int64_t block, int64_t begin, int64_t end, const char *nothing,
                 const char **at) {
  int64_t bytes = t->head_dim * (t->is_bf16 ? 2 : 4), page = -1, offset = 0;
  const char *start = nothing;
  for (int i = 0; i < BLOCK; i++) {
    int64_t position = block + i;
    if (position < begin || position >= end) {
      at[i] = nothing;
      continue;
    }
    if (page < 0 || ++offset == t->page_tokens) {
      page = position / t->page_tokens;
      offset = position % t->page_tokens;
      start = base + t->pages[page] * t->page_stride * (t->is_bf16 ? 2 : 4);
    }
    at[i] = start + offset * bytes;
  }
}

#if defined(__x86_64__)
/* 16 keys from element d on, to out[d ..][16]: 16 float32 elements, or 32 BF16 ones, moved in pairs. */
static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq"))) void transpose_16(
    const char *const *at, int64_t d, int64_t head_dim, int is_bf16, float *out) {
  __m512i a[16], b[16];
  int64_t left = head_dim - d;
  if (is_bf16) {
    __mmask32 m = left >= 32 ? 0xffffffff : (1u << left) - 1;
    for (int i = 0; i < 16; i++) a[i] = _mm512_maskz_loadu_epi16(m, at[i] + d * 2);
  } else {
    __mmask16 m = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
    for (int i = 0; i < 16; i++) a[i] = _mm512_maskz_loadu_epi32(m, at[i] + d * 4);
  }
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; i++) { /* a[4 k + i]: keys 4 k .. 4 k + 3 of elements i, 4 + i, 8 + i, 12 + i */
    __m512i even = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), odd = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    __m512i even2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    __m512i odd2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    b[i] = _mm512_shuffle_i32x4(even, even2, 0x88);
    b[4 + i] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    b[8 + i] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    b[12 + i] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
  for (int i = 0; i < 16; i++) {
    if (!is_bf16) {
      if (i < left) _mm512_storeu_si512(out + (d + i) * BLOCK, b[i]);
      continue;
    }
    if (2 * i < left) _mm512_storeu_si512(out + (d + 2 * i) * BLOCK, _mm512_slli_epi32(b[i], 16));
    if (2 * i + 1 < left) {
      __m512i high = _mm512_and_si512(b[i], _mm512_set1_epi32((int)0xffff0000));
      _mm512_storeu_si512(out + (d + 2 * i + 1) * BLOCK, high);
    }
  }
}
#endif

#define NYB_AVX512 0
#define NYB_AVX2 0
#include "lanes.h"
#include "tile.h"
#if defined(__x86_64__)
#undef NYB_AVX2
#define NYB_AVX2 1
#include "lanes.h"
#include "tile.h"
#undef NYB_AVX2
#undef NYB_AVX512
#define NYB_AVX2 0
#define NYB_AVX512 1
#include "lanes.h"
#include "tile.h"
#endif

#if defined(__x86_64__)
#define CALL(isa, function, ...)                                     \
  do {                                                               \
    if ((isa) >= NYB_ISA_AVX512) function##_avx512(__VA_ARGS__);     \
    else if ((isa) >= NYB_ISA_AVX2) function##_avx2(__VA_ARGS__);    \
    else function##_portable(__VA_ARGS__);                           \
  } while (0)
#else
#define CALL(isa, function, ...) function##_portable(__VA_ARGS__)
#endif

/* ------------------------------------------------------------------------------------------------------ attention */

typedef struct {
  tile *tiles;
  int64_t count, segments; /* segments: the most that any tile has */
  float factor;
  int isa;
  int64_t most_rows, head_dim, stride;
  scratch *free; /* one per thread */
  _Atomic int *taken;
  float *parts; /* [tiles][segments][rows][stride + 2], if segments are shared out */
} job;

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* Floats of one scratch; with memory to lay it out in, also that. */
static int64_t lay_out(const job *j, float *memory, scratch *s) {
  int64_t rows = round_up(j->most_rows, 16), at = 0;
  struct { float **where; int64_t count; } parts[] = {
      {&s->q, rows * j->head_dim},          {&s->keys, round_up(j->head_dim, 32) * BLOCK},
      {&s->values, j->stride * BLOCK},      {&s->scores, 6 * BLOCK},
      {&s->mixed, rows * j->stride},        {&s->largest, rows},
      {&s->sums, rows * 16},                {&s->sum, rows},
      {&s->total, rows * j->stride},
      {&s->total_largest, rows},            {&s->total_sum, rows},
  };
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
    if (memory) *parts[i].where = memory + at;
    at += round_up(parts[i].count, 16);
  }
  if (memory) s->nothing = memset(memory + at, 0, (size_t)j->stride * sizeof(float));
  return at + j->stride;
}

static scratch *take_scratch(job *j, int *which) {
  for (*which = 0;; ++*which) { /* there are as many as threads: one is free */
    int expected = 0;
    if (atomic_compare_exchange_strong(&j->taken[*which], &expected, 1)) return &j->free[*which];
  }
}

static void load_queries(const tile *t, float *q) {
  int64_t floats = t->group * t->head_dim;
  for (int i = 0; i < t->tokens; i++) {
    memcpy(q + i * floats, t->q + i * t->token_stride, (size_t)floats * sizeof(float));
  }
}

static void store_result(const tile *t, const float *total, const float *sum) {
  for (int i = 0; i < t->tokens * t->group; i++) {
    float *out = t->out + i / t->group * t->token_stride + i % t->group * t->head_dim;
    float inverse = 1 / sum[i]; /* a row sees itself at least */
    for (int64_t d = 0; d < t->head_dim; d++) out[d] = total[i * t->stride + d] * inverse;
  }
}

static void clear_total(const tile *t, scratch *s) {
  for (int r = 0; r < t->tokens * t->group; r++) {
    s->total_largest[r] = -INFINITY;
    s->total_sum[r] = 0;
  }
}

static int64_t segments_of(const tile *t) { return (t->position + t->tokens + SEGMENT - 1) / SEGMENT; }
static int64_t first_segment(const tile *t) {
  return t->window && t->position - t->window + 1 > 0 ? (t->position - t->window + 1) / SEGMENT : 0;
}

static void whole_tile(void *context, int64_t index) {
  job *j = context;
  const tile *t = &j->tiles[j->count - 1 - index]; /* the last of a sequence see most */
  int which;
  scratch *s = take_scratch(j, &which);
  load_queries(t, s->q);
  int64_t segment = first_segment(t);
  CALL(j->isa, tile_segment, t, s, segment, j->factor);
  scratch first = *s; /* what the first segment gave is the total so far: change places */
  s->mixed = first.total, s->largest = first.total_largest, s->sum = first.total_sum;
  s->total = first.mixed, s->total_largest = first.largest, s->total_sum = first.sum;
  for (segment++; segment < segments_of(t); segment++) {
    CALL(j->isa, tile_segment, t, s, segment, j->factor);
    for (int r = 0; r < t->tokens * t->group; r++) {
      CALL(j->isa, merge, t->stride, s->total + r * t->stride, &s->total_largest[r], &s->total_sum[r],
           s->mixed + r * t->stride, s->largest[r], s->sum[r]);
    }
  }
  store_result(t, s->total, s->total_sum);
  atomic_store(&j->taken[which], 0);
}

static float *part_of(const job *j, int64_t tile_index, int64_t segment) {
  return j->parts + (tile_index * j->segments + segment) * j->most_rows * (j->stride + 2);
}

static void one_segment(void *context, int64_t index) {
  job *j = context;
  int64_t segment = index % j->segments;
  const tile *t = &j->tiles[index / j->segments];
  if (segment < first_segment(t) || segment >= segments_of(t)) return;
  int which, rows = t->tokens * t->group;
  scratch *s = take_scratch(j, &which);
  load_queries(t, s->q);
  CALL(j->isa, tile_segment, t, s, segment, j->factor);
  float *part = part_of(j, index / j->segments, segment);
  memcpy(part, s->largest, (size_t)rows * sizeof(float));
  memcpy(part + rows, s->sum, (size_t)rows * sizeof(float));
  memcpy(part + 2 * rows, s->mixed, (size_t)(rows * t->stride) * sizeof(float));
  atomic_store(&j->taken[which], 0);
}

static void merge_segments(void *context, int64_t index) {
  job *j = context;
  const tile *t = &j->tiles[index];
  int which, rows = t->tokens * t->group;
  scratch *s = take_scratch(j, &which);
  clear_total(t, s);
  for (int64_t segment = first_segment(t); segment < segments_of(t); segment++) {
    const float *part = part_of(j, index, segment);
    for (int r = 0; r < rows; r++) {
      CALL(j->isa, merge, t->stride, s->total + r * t->stride, &s->total_largest[r], &s->total_sum[r],
           part + 2 * rows + r * t->stride, part[r], part[rows + r]);
    }
  }
  store_result(t, s->total, s->total_sum);
  atomic_store(&j->taken[which], 0);
}

/* Cuts the batch into tiles; with j->tiles NULL it only counts them. */
static int64_t cut(job *j, const nyb_pages *p, const float *q, float *out, int64_t query_heads, int64_t window) {
  int group = (int)(query_heads / p->kv_heads), step = TILE_ROWS / group > 0 ? TILE_ROWS / group : 1;
  int64_t n = 0, bytes = p->is_bf16 ? 2 : 4, per_head = p->page_tokens * p->head_dim;
  for (int64_t b = 0; b < p->sequences; b++) {
    for (int64_t i = p->starts[b]; i < p->starts[b + 1]; i += step) {
      for (int64_t h = 0; h < p->kv_heads; h++, n++) {
        int tokens = p->starts[b + 1] - i < step ? (int)(p->starts[b + 1] - i) : step;
        int64_t at = (i * query_heads + h * group) * p->head_dim;
        tile t = {.keys = p->keys + h * per_head * bytes, .values = p->values + h * per_head * bytes,
                  .pages = p->table + b * p->width, .q = q + at, .out = out + at,
                  .token_stride = query_heads * p->head_dim, .page_stride = p->kv_heads * per_head,
                  .page_tokens = p->page_tokens, .position = p->lengths[b] + i - p->starts[b], .window = window,
                  .head_dim = p->head_dim, .stride = j->stride, .tokens = tokens, .group = group,
                  .is_bf16 = (int)p->is_bf16};
        if (j->tiles) j->tiles[n] = t;
        if (tokens * group > j->most_rows) j->most_rows = tokens * group;
        if (segments_of(&t) > j->segments) j->segments = segments_of(&t);
      }
    }
  }
  return n;
}

static void *get(size_t bytes) {
  void *found = aligned_alloc(64, (bytes + 64) / 64 * 64);
  if (!found) abort();
  return found;
}

void nyb_paged_attention(const nyb_pages *pages, const float *q, float *out, int64_t query_heads, float scale,
                         int64_t window, int isa, int threads) {
  job j = {.isa = isa, .head_dim = pages->head_dim, .stride = round_up(pages->head_dim, 16)};
  j.factor = (float)((double)scale * 1.4426950408889634074); /* scores in powers of two */
  j.count = cut(&j, pages, q, out, query_heads, window);
  if (!j.count) return;
  if (threads < 1) threads = 1;
  j.tiles = get((size_t)j.count * sizeof(tile));
  cut(&j, pages, q, out, query_heads, window);
  scratch unused;
  int64_t floats = round_up(lay_out(&j, NULL, &unused), 16);
  float *memory = get((size_t)(floats * threads) * sizeof(float));
  j.free = get((size_t)threads * sizeof(scratch));
  j.taken = get((size_t)threads * sizeof(*j.taken));
  for (int i = 0; i < threads; i++) {
    lay_out(&j, memory + i * floats, &j.free[i]);
    atomic_init(&j.taken[i], 0);
  }
  if (threads > 1 && j.count < 4 * threads && j.segments > 1) {
    j.parts = get((size_t)(j.count * j.segments * j.most_rows * (j.stride + 2)) * sizeof(float));
    nyb_parallel(one_segment, &j, j.count * j.segments, threads);
    nyb_parallel(merge_segments, &j, j.count, threads);
    free(j.parts);
  } else {
    nyb_parallel(whole_tile, &j, j.count, threads);
  }
  free(j.taken);
  free(j.free);
  free(memory);
  free(j.tiles);
}

/* ---------------------------------------------------------------------------------------------------------- write */

static inline __attribute__((always_inline)) void narrow(const float *source, int64_t n, uint16_t *out) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t u;
    memcpy(&u, source + i, 4);
    uint32_t even = (u + 0x7fff + ((u >> 16) & 1)) >> 16, quiet = (u >> 16) | 0x40; /* NaN must not become infinity */
    out[i] = (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? quiet : even);
  }
}
static void narrow_portable(const float *source, int64_t n, uint16_t *out) { narrow(source, n, out); }
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void narrow_avx2(const float *source, int64_t n, uint16_t *out) {
  narrow(source, n, out);
}
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) static void narrow_avx512(const float *source, int64_t n,
                                                                                          uint16_t *out) {
  narrow(source, n, out);
}
#endif

void nyb_paged_write(const nyb_pages *pages, const float *k, const float *v, int isa) {
  const nyb_pages *p = pages;
  int64_t bytes = p->head_dim * (p->is_bf16 ? 2 : 4);
  for (int64_t b = 0; b < p->sequences; b++) {
    for (int64_t i = p->starts[b]; i < p->starts[b + 1]; i++) {
      int64_t position = p->lengths[b] + i - p->starts[b];
      int64_t page = p->table[b * p->width + position / p->page_tokens], offset = position % p->page_tokens;
      for (int64_t h = 0; h < p->kv_heads; h++) {
        int64_t to = ((page * p->kv_heads + h) * p->page_tokens + offset) * bytes;
        int64_t from = (i * p->kv_heads + h) * p->head_dim;
        if (p->is_bf16) {
          CALL(isa, narrow, k + from, p->head_dim, (uint16_t *)(p->keys + to));
          CALL(isa, narrow, v + from, p->head_dim, (uint16_t *)(p->values + to));
        } else {
          memcpy(p->keys + to, k + from, (size_t)bytes);
          memcpy(p->values + to, v + from, (size_t)bytes);
        }
      }
    }
  }
}
