/* Attention over pages on a CPU: tiles of queries, segments of keys, instruction sets, entry points. The arithmetic is
 * in tile.h; the definition beside it is reference.py. */
#include "cpu.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../pool.h"
#include "../program.h"

/* The softmax of a row is summed over blocks, those of a segment one after another, then over segments. Both lie at
 * absolute multiples, so that the order does not depend on who works on what; segments share a long decode out. */
#define BLOCK 64
#define SEGMENT 256
#define TOKEN_ROWS 16 /* query heads of a group, at most, for one token to be alone in a tile */
#define TILE_ROWS 96 /* rows that share a transposed block of keys: 48 cost 7 %, 192 gain 1 % */

/* Consecutive tokens of one sequence, and one key/value head with the query heads of its group. */
typedef struct {
  const char *keys, *values; /* of page 0 and this head */
  const int32_t *pages;      /* the sequence's row of the table */
  const float *q;            /* of the first token and query head */
  float *out;
  int64_t q_token, q_head, out_token; /* strides in floats */
  int64_t page_bytes, page_tokens;    /* page_bytes: from page to page */
  int64_t position, window, first;    /* position of the first token; before `first` a query sees only itself */
  int64_t head_dim, stride;           /* stride: head_dim rounded up to whole vectors */
  int64_t split;                      /* index of its parts if its segments are shared out, else -1 */
  int tokens, group, format;
} tile;

typedef struct {
  float *q;       /* [rows][head_dim] */
  float *keys;    /* [head_dim][BLOCK] */
  float *values;  /* [BLOCK][stride], or a few columns of it */
  float *scores;  /* [TOKEN_ROWS][BLOCK] */
  float *mixed;   /* [rows][stride] of the segment */
  float *largest; /* [rows] of the segment */
  float *sums;    /* [rows][16] of the segment, by lane */
  float *sum;     /* [rows] of the segment */
  float *total, *total_largest, *total_sum; /* the same over all segments */
  char *nothing;  /* [stride] zeros, for positions that nobody sees */
} scratch;

static inline int64_t bytes_of(int format) { return format == NYB_PAGES_F32 ? 4 : format == NYB_PAGES_BF16 ? 2 : 1; }

static inline float value_of_e4m3(uint8_t code) {
  uint32_t magnitude = code & 0x7f, bits = (magnitude << 20) + (120u << 23);
  float x = (float)magnitude * 0x1p-9f; /* a subnormal code */
  if (magnitude >= 8) memcpy(&x, &bits, 4);
  if (magnitude == 0x7f) x = NAN;
  return code & 0x80 ? -x : x;
}

/* n elements from index `at` on, as float32. E4M3 without its scale, which scores and sums are multiplied with. */
static inline void widen(const char *source, int64_t at, int n, int format, float *out) {
  if (format == NYB_PAGES_F32) memcpy(out, source + at * 4, (size_t)n * 4);
  else if (format == NYB_PAGES_E4M3) {
    for (int i = 0; i < n; i++) out[i] = value_of_e4m3((uint8_t)source[at + i]);
  } else {
    for (int i = 0; i < n; i++) {
      uint16_t h;
      memcpy(&h, source + (at + i) * 2, 2);
      uint32_t wide = (uint32_t)h << 16;
      memcpy(out + i, &wide, 4);
    }
  }
}

/* The first position that the query at position `at` sees. It does not fall as `at` rises. */
static inline int64_t seen_from(const tile *t, int64_t at) {
  int64_t of_window = t->window ? at - t->window + 1 : 0, first = t->first < at ? t->first : at;
  return of_window > first ? of_window : first;
}

/* Where positions block + first .. block + end - 1 lie; those outside low .. high - 1 of the block have no page, or
 * nothing in it yet. */
static inline void find(const tile *t, const char *base, int64_t block, int first, int end, int low, int high,
                        const char *nothing, const char **at) {
  int64_t bytes = t->head_dim * bytes_of(t->format);
  for (int i = first; i < low; i++) at[i] = nothing;
  for (int i = low; i < high;) {
    int64_t page = (block + i) / t->page_tokens, offset = (block + i) % t->page_tokens;
    const char *from = base + t->pages[page] * t->page_bytes + offset * bytes;
    int stop = t->page_tokens - offset < high - i ? i + (int)(t->page_tokens - offset) : high;
    for (; i < stop; i++, from += bytes) at[i] = from;
  }
  for (int i = high; i < end; i++) at[i] = nothing;
}

/* Where the keys and values of a block lie, and which of them are seen: low .. high - 1. Keys are found in whole
 * sixteens, as they are transposed. */
typedef struct {
  const char *keys[BLOCK], *values[BLOCK];
  int low, high;
} places;
static void look_up(const tile *t, int64_t block, int64_t begin, int64_t end, const char *nothing, places *p) {
  p->low = begin > block ? (int)(begin - block) : 0;
  p->high = end - block < BLOCK ? (int)(end - block) : BLOCK;
  find(t, t->keys, block, p->low / 16 * 16, (p->high + 15) / 16 * 16, p->low, p->high, nothing, p->keys);
  find(t, t->values, block, p->low, BLOCK, p->low, p->high, nothing, p->values);
}

/* Rows first .. end - 1 to ask for before they are needed, some at a time: pages lie anywhere, so the processor does
 * not foresee where the next block begins, and it waits for no more than a few dozen lines at once. */
typedef struct {
  const char *const *at;
  int first, end;
  int64_t bytes;
} asking;
static inline void ask(asking *a, int rows) {
  for (; rows > 0 && a->first < a->end; rows--, a->first++) {
    for (int64_t d = 0; d < a->bytes; d += 64) __builtin_prefetch(a->at[a->first] + d, 0, 3);
  }
}

#if defined(__x86_64__)
/* E4M3 codes, sign-extended to 16 bits, as BF16: exponent and mantissa move over, but subnormal codes and NaN, which is
 * 0x7f, come from a table by their low four bits. */
static const uint16_t e4m3_table[32] = {
    0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60, 0, 0, 0, 0, 0, 0, 0, 0x7fc0,
    0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60, 0, 0, 0, 0, 0, 0, 0, 0x7fc0};
#define AVX512 static inline __attribute__((always_inline, target("avx512f,avx512bw,avx512vl,avx512dq")))
AVX512 __m512i bf16_of_codes(__m256i codes) {
  const __m512i x = _mm512_cvtepi8_epi16(codes), low = _mm512_set1_epi16(0x7f);
  const __m512i magnitude = _mm512_and_si512(x, low);
  const __m512i next = _mm512_and_si512(_mm512_add_epi16(x, _mm512_set1_epi16(1)), low); /* of NaN 0 */
  __m512i y = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
  const __mmask32 odd = _mm512_cmple_epu16_mask(next, _mm512_set1_epi16(8));
  y = _mm512_mask_permutexvar_epi16(y, odd, magnitude, _mm512_loadu_si512(e4m3_table));
  return _mm512_ternarylogic_epi32(y, x, _mm512_set1_epi16((short)0x8000), 0xf8); /* y | (x & sign) */
}
AVX512 __m256i bf16_of_16_codes(__m128i codes) {
  const __m256i x = _mm256_cvtepi8_epi16(codes), low = _mm256_set1_epi16(0x7f);
  const __m256i magnitude = _mm256_and_si256(x, low);
  const __m256i next = _mm256_and_si256(_mm256_add_epi16(x, _mm256_set1_epi16(1)), low);
  __m256i y = _mm256_add_epi16(_mm256_slli_epi16(magnitude, 4), _mm256_set1_epi16(120 << 7));
  const __mmask16 odd = _mm256_cmple_epu16_mask(next, _mm256_set1_epi16(8));
  y = _mm256_mask_permutexvar_epi16(y, odd, magnitude, _mm256_loadu_si256((const void *)e4m3_table));
  return _mm256_ternarylogic_epi32(y, x, _mm256_set1_epi16((short)0x8000), 0xf8);
}

/* 16 keys from element d on, to out[d ..][width]: 16 float32 elements, or 32 narrower ones, moved in pairs as BF16. */
AVX512 void transpose_16(const char *const *at, int64_t d, int64_t head_dim, const int format, float *out,
                         int64_t width) {
  const int is_bf16 = format != NYB_PAGES_F32;
  __m512i a[16], b[16];
  int64_t left = head_dim - d;
  __mmask32 m = left >= 32 ? 0xffffffff : (1u << left) - 1;
  if (format == NYB_PAGES_BF16) {
    for (int i = 0; i < 16; i++) a[i] = _mm512_maskz_loadu_epi16(m, at[i] + d * 2);
  } else if (format == NYB_PAGES_E4M3) {
    for (int i = 0; i < 16; i++) a[i] = bf16_of_codes(_mm256_maskz_loadu_epi8(m, at[i] + d));
  } else {
    __mmask16 n = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
    for (int i = 0; i < 16; i++) a[i] = _mm512_maskz_loadu_epi32(n, at[i] + d * 4);
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
  const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
  const int64_t count = is_bf16 ? (left + 1) / 2 : left;
  _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) {
    if (i >= count) break;
    float *to = out + (d + (is_bf16 ? 2 * i : i)) * width;
    _mm512_storeu_si512(to, is_bf16 ? _mm512_slli_epi32(b[i], 16) : b[i]);
    if (is_bf16 && 2 * i + 1 < left) _mm512_storeu_si512(to + width, _mm512_and_si512(b[i], upper));
  }
}
#endif

#define NYB_BODY "paged_attention/tile.h"
#include "../every_isa.h"

/* ------------------------------------------------------------------------------------------------------ attention */

#define ALONE 400000     /* work that one thread has done before another wakes, about 10 us */
#define PARTS (16 << 20) /* floats of split tiles, at most */
#define FIXED_ROWS 4     /* what reading a block costs, in rows of arithmetic */

/* A tile, or one segment of a tile that is split. */
typedef struct {
  int64_t tile, segment;
} unit;

typedef struct {
  tile *tiles;
  unit *units;
  _Atomic int *left; /* [tiles] segments of a split tile that are not done */
  float *parts;      /* of split tiles, for each segment: largest [rows], sum [rows], mixed [rows][stride] */
  scratch *free;     /* one per thread */
  _Atomic int *taken;
  int64_t count, most_rows, head_dim, stride;
  double work;
  float factor, value_scale;
  int isa;
} job;

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* Floats of one scratch; with memory to lay it out in, also that. */
static int64_t lay_out(const job *j, float *memory, scratch *s) {
  int64_t rows = round_up(j->most_rows, 16), at = 0;
  struct { float **where; int64_t count; } parts[] = {
      {&s->q, rows * j->head_dim},          {&s->keys, round_up(j->head_dim, 32) * BLOCK},
      {&s->values, j->stride * BLOCK},      {&s->scores, TOKEN_ROWS * BLOCK},
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

static int take_scratch(job *j) {
  for (int which = 0;; which++) { /* there are as many as threads: one is free */
    int expected = 0;
    if (atomic_compare_exchange_strong(&j->taken[which], &expected, 1)) return which;
  }
}

static void load_queries(const tile *t, float *q) {
  for (int i = 0; i < t->tokens; i++) {
    for (int h = 0; h < t->group; h++, q += t->head_dim) {
      memcpy(q, t->q + i * t->q_token + h * t->q_head, (size_t)t->head_dim * sizeof(float));
    }
  }
}

static void store_result(const job *j, const tile *t, const float *total, const float *sum) {
  for (int i = 0; i < t->tokens * t->group; i++) {
    float *out = t->out + i / t->group * t->out_token + i % t->group * t->head_dim;
    float factor = j->value_scale / sum[i]; /* a row sees itself at least */
    for (int64_t d = 0; d < t->head_dim; d++) out[d] = total[i * t->stride + d] * factor;
  }
}

static int64_t first_position(const tile *t) { return seen_from(t, t->position); }
static int64_t first_segment(const tile *t) { return first_position(t) / SEGMENT; }
static int64_t end_segment(const tile *t) { return (t->position + t->tokens + SEGMENT - 1) / SEGMENT; }
static double work_of(const tile *t) {
  return (double)(t->tokens * t->group + FIXED_ROWS) * (double)(t->position + t->tokens - first_position(t)) *
         (double)t->head_dim;
}

static void whole_tile(const job *j, const tile *t, scratch *s) {
  int64_t segment = first_segment(t);
  CALL(j->isa, tile_segment, t, s, segment, j->factor);
  scratch first = *s; /* what the first segment gave is the total so far: change places */
  s->mixed = first.total, s->largest = first.total_largest, s->sum = first.total_sum;
  s->total = first.mixed, s->total_largest = first.largest, s->total_sum = first.sum;
  for (segment++; segment < end_segment(t); segment++) {
    CALL(j->isa, tile_segment, t, s, segment, j->factor);
    for (int r = 0; r < t->tokens * t->group; r++) {
      CALL(j->isa, merge, t->stride, s->total + r * t->stride, &s->total_largest[r], &s->total_sum[r],
           s->mixed + r * t->stride, s->largest[r], s->sum[r]);
    }
  }
  store_result(j, t, s->total, s->total_sum);
}

static float *part_of(const job *j, const tile *t, int64_t segment) {
  return j->parts + t->split + (segment - first_segment(t)) * t->tokens * t->group * (t->stride + 2);
}

static void one_segment(const job *j, const tile *t, const scratch *s, int64_t segment) {
  int rows = t->tokens * t->group;
  CALL(j->isa, tile_segment, t, s, segment, j->factor);
  float *part = part_of(j, t, segment);
  memcpy(part, s->largest, (size_t)rows * sizeof(float));
  memcpy(part + rows, s->sum, (size_t)rows * sizeof(float));
  memcpy(part + 2 * rows, s->mixed, (size_t)(rows * t->stride) * sizeof(float));
}

static void merge_segments(const job *j, const tile *t, const scratch *s) {
  int rows = t->tokens * t->group;
  for (int r = 0; r < rows; r++) {
    s->total_largest[r] = -INFINITY;
    s->total_sum[r] = 0;
  }
  for (int64_t segment = first_segment(t); segment < end_segment(t); segment++) {
    const float *part = part_of(j, t, segment);
    for (int r = 0; r < rows; r++) {
      CALL(j->isa, merge, t->stride, s->total + r * t->stride, &s->total_largest[r], &s->total_sum[r],
           part + 2 * rows + r * t->stride, part[r], part[rows + r]);
    }
  }
  store_result(j, t, s->total, s->total_sum);
}

static void run_unit(void *context, int64_t index) {
  job *j = context;
  unit u = j->units[index];
  const tile *t = &j->tiles[u.tile];
  int which = take_scratch(j);
  scratch *s = &j->free[which];
  load_queries(t, s->q);
  if (t->split < 0) whole_tile(j, t, s);
  else {
    one_segment(j, t, s, u.segment);
    if (atomic_fetch_sub(&j->left[u.tile], 1) == 1) merge_segments(j, t, s);
  }
  atomic_store(&j->taken[which], 0);
}

/* The pages, and whose they are. */
typedef struct {
  const char *keys, *values;
  const int32_t *table, *starts, *lengths;
  int64_t sequences, width, kv_heads, page_tokens, head_dim;
  int format;
} memory_of_sequences;

/* Cuts the batch into tiles; with j->tiles NULL it only counts them and their work. */
static void cut(job *j, const memory_of_sequences *p, tile t, int64_t query_heads) {
  const int64_t step = TILE_ROWS / t.group > 0 ? TILE_ROWS / t.group : 1;
  const int64_t head_bytes = p->page_tokens * p->head_dim * bytes_of(p->format);
  const float *q = t.q;
  float *out = t.out;
  j->count = 0;
  for (int64_t b = 0; b < p->sequences; b++) {
    for (int64_t i = p->starts[b]; i < p->starts[b + 1]; i += step) {
      t.pages = p->table + b * p->width;
      t.position = p->lengths[b] + i - p->starts[b];
      t.tokens = (int)(p->starts[b + 1] - i < step ? p->starts[b + 1] - i : step);
      for (int64_t h = 0; h < p->kv_heads; h++, j->count++) {
        if (!j->tiles) {
          j->work += work_of(&t);
          if (t.tokens * t.group > j->most_rows) j->most_rows = t.tokens * t.group;
          continue;
        }
        t.keys = p->keys + h * head_bytes;
        t.values = p->values + h * head_bytes;
        t.q = q + i * t.q_token + h * t.group * t.q_head;
        t.out = out + (i * query_heads + h * t.group) * t.head_dim;
        j->tiles[j->count] = t;
      }
    }
  }
}

/* Decides which tiles are split, so that none is much of the work of a thread. Returns the number of units; with
 * j->units it lists them, the large ones first. *floats is what the parts take. */
static int64_t divide(job *j, int threads, int64_t *floats) {
  int64_t n = 0;
  *floats = 0;
  for (int64_t i = 0; i < j->count; i++) {
    tile *t = &j->tiles[i];
    int64_t first = first_segment(t), segments = end_segment(t) - first;
    int64_t needed = segments * t->tokens * t->group * (t->stride + 2);
    int is_split = threads > 1 && segments > 1 && work_of(t) * 2 * threads > j->work && *floats + needed <= PARTS;
    t->split = is_split ? *floats : -1;
    if (!is_split) continue;
    *floats += needed;
    if (j->units) {
      atomic_init(&j->left[i], (int)segments);
      for (int64_t s = 0; s < segments; s++) j->units[n + s] = (unit){i, first + s};
    }
    n += segments;
  }
  for (int64_t i = j->count - 1; i >= 0; i--) { /* the last of a sequence see most */
    if (j->tiles[i].split >= 0) continue;
    if (j->units) j->units[n] = (unit){i, -1};
    n++;
  }
  return n;
}

/* Memory that a thread keeps between calls: 0 for tiles, 1 for the rest. */
typedef struct {
  void *at[2];
  size_t bytes[2];
} kept_memory;
static pthread_key_t kept_key;
static pthread_once_t kept_once = PTHREAD_ONCE_INIT;
static void drop_kept(void *held) {
  kept_memory *kept = held;
  free(kept->at[0]);
  free(kept->at[1]);
  free(kept);
}
static void make_key(void) { pthread_key_create(&kept_key, drop_kept); }
static void *keep(int which, size_t bytes) {
  pthread_once(&kept_once, make_key);
  kept_memory *kept = pthread_getspecific(kept_key);
  if (!kept) {
    kept = calloc(1, sizeof *kept);
    if (!kept || pthread_setspecific(kept_key, kept)) return NULL;
  }
  if (kept->bytes[which] < bytes) {
    bytes = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    free(kept->at[which]);
    kept->at[which] = aligned_alloc(64, bytes);
    kept->bytes[which] = kept->at[which] ? bytes : 0;
  }
  return kept->at[which];
}

/* Lays out the memory that the job needs beside its tiles. Returns 0, or 1 without memory. */
static int prepare(job *j, int64_t units, int64_t parts, int threads) {
  scratch unused;
  int64_t floats = round_up(lay_out(j, NULL, &unused), 16), at = 0;
  struct { void **where; int64_t bytes; } areas[] = {
      {(void **)&j->units, units * (int64_t)sizeof(unit)},
      {(void **)&j->left, j->count * (int64_t)sizeof(*j->left)},
      {(void **)&j->free, threads * (int64_t)sizeof(scratch)},
      {(void **)&j->taken, threads * (int64_t)sizeof(*j->taken)},
      {(void **)&j->parts, parts * (int64_t)sizeof(float)},
  };
  const int count = sizeof areas / sizeof *areas;
  for (int i = 0; i < count; i++) at += round_up(areas[i].bytes, 64);
  char *memory = keep(1, (size_t)(at + floats * threads * (int64_t)sizeof(float)));
  if (!memory) return 1;
  for (int i = 0; i < count; i++) {
    *areas[i].where = memory;
    memory += round_up(areas[i].bytes, 64);
  }
  for (int i = 0; i < threads; i++) {
    lay_out(j, (float *)(void *)memory + i * floats, &j->free[i]);
    atomic_init(&j->taken[i], 0);
  }
  return 0;
}

int nyb_paged_attention(const char *keys, const char *values, const int32_t *table, const int32_t *starts,
                        const int32_t *lengths, int64_t sequences, int64_t width, int64_t kv_heads,
                        int64_t page_tokens, int64_t head_dim, int format, float key_scale, float value_scale,
                        const float *q, int64_t q_token, int64_t q_head, float *out, int64_t query_heads, float scale,
                        int64_t window, int64_t first, int isa, int threads) {
  job j = {.isa = isa, .head_dim = head_dim, .stride = round_up(head_dim, 16), .value_scale = value_scale};
  j.factor = (float)((double)scale * key_scale * 1.4426950408889634074); /* scores in powers of two */
  const memory_of_sequences pages = {keys, values, table, starts, lengths, sequences, width, kv_heads, page_tokens,
                                     head_dim, format};
  const tile common = {.q = q, .out = out, .q_token = q_token, .q_head = q_head, .out_token = query_heads * head_dim,
                       .page_bytes = kv_heads * page_tokens * head_dim * bytes_of(format), .page_tokens = page_tokens,
                       .window = window, .first = first, .head_dim = head_dim, .stride = j.stride,
                       .group = (int)(query_heads / kv_heads), .format = format};
  cut(&j, &pages, common, query_heads);
  if (!j.count) return 0;
  j.tiles = keep(0, (size_t)j.count * sizeof(tile));
  if (!j.tiles) return 1;
  cut(&j, &pages, common, query_heads);
  if (threads < 1 || j.work < ALONE) threads = 1;
  int64_t parts, units = divide(&j, threads, &parts);
  if (threads > units) threads = (int)units;
  if (prepare(&j, units, parts, threads)) return 1;
  divide(&j, threads, &parts);
  nyb_parallel(run_unit, &j, units, threads);
  return 0;
}

NYB_STEP(nyb_paged_attention) {
  return nyb_paged_attention(v[0].p, v[1].p, v[2].p, v[3].p, v[4].p, v[5].n, v[6].n, v[7].n, v[8].n, v[9].n,
                             (int)v[10].n, (float)v[11].f, (float)v[12].f, v[13].p, v[14].n, v[15].n, v[16].p, v[17].n,
                             (float)v[18].f, v[19].n, v[20].n, (int)v[21].n, (int)v[22].n);
}
