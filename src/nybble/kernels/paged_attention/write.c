/* Writing keys and values into pages, rounded to what the pages hold. The definition is reference.py. */
#include <string.h>

#include "../pool.h"
#include "../program.h"
#include "cpu.h"

#define TASK 32768 /* floats of a task, some microseconds; fewer are not worth waking a thread */

/* BF16, to nearest even. */
static inline __attribute__((always_inline)) void to_bf16(const float *source, int64_t n, uint16_t *out) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t u;
    memcpy(&u, source + i, 4);
    uint32_t even = (u + 0x7fff + ((u >> 16) & 1)) >> 16, quiet = (u >> 16) | 0x40; /* NaN must not become infinity */
    out[i] = (uint16_t)((u & 0x7fffffff) > 0x7f800000 ? quiet : even);
  }
}

/* E4M3 of x / scale, to nearest even, at most 448 in magnitude; returns how many were more. NaN is 0x7f. */
static inline __attribute__((always_inline)) int64_t to_e4m3(const float *source, int64_t n, float scale,
                                                             uint8_t *out) {
  const uint32_t most = 0x43e00000, smallest_normal = 0x3c800000; /* 448 and 2^-6 */
  int32_t clipped = 0;
  for (int64_t i = 0; i < n; i++) {
    float x = source[i] / scale, magnitude;
    uint32_t u, sign, moved;
    memcpy(&u, &x, 4);
    sign = u >> 24 & 0x80;
    u &= 0x7fffffff;
    uint32_t is_nan = u > 0x7f800000, is_over = u > most;
    clipped += (int32_t)(is_over & ~is_nan);
    u = is_over ? most : u;
    memcpy(&magnitude, &u, 4);
    magnitude += 0x1p14f; /* whose last bit is worth 2^-9, as that of a subnormal code */
    memcpy(&moved, &magnitude, 4);
    uint32_t normal = ((u + 0x7ffff + (u >> 20 & 1)) >> 20) - (120u << 3);
    uint32_t code = u < smallest_normal ? moved - 0x46800000 : normal;
    out[i] = (uint8_t)(is_nan ? 0x7f : code | sign);
  }
  return clipped;
}

static inline __attribute__((always_inline)) int64_t convert(const float *source, int64_t n, int format, float scale,
                                                             char *out) {
  if (format == NYB_PAGES_E4M3) return to_e4m3(source, n, scale, (uint8_t *)out);
  if (format == NYB_PAGES_BF16) to_bf16(source, n, (uint16_t *)(void *)out);
  else memcpy(out, source, (size_t)n * sizeof(float));
  return 0;
}
static int64_t convert_portable(const float *source, int64_t n, int format, float scale, char *out) {
  return convert(source, n, format, scale, out);
}
#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static int64_t convert_avx2(const float *source, int64_t n, int format, float scale,
                                                                char *out) {
  return convert(source, n, format, scale, out);
}
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) static int64_t convert_avx512(const float *source,
                                                                                            int64_t n, int format,
                                                                                            float scale, char *out) {
  return convert(source, n, format, scale, out);
}
#endif

typedef struct {
  const float *from;
  int64_t token, head;
  char *pages;
  float scale;
} side; /* keys or values */

typedef struct {
  side sides[2];
  const int32_t *table, *starts, *lengths;
  int64_t sequences, width, kv_heads, page_tokens, head_dim, per_task;
  int64_t *clipped;
  int64_t (*convert)(const float *, int64_t, int, float, char *);
  int format;
} write_job;

static int64_t write_token(const write_job *j, int64_t b, int64_t i) {
  static const int64_t widths[] = {4, 2, 1};
  int64_t position = j->lengths[b] + i - j->starts[b], bytes = j->head_dim * widths[j->format], clipped = 0;
  int64_t page = j->table[b * j->width + position / j->page_tokens], offset = position % j->page_tokens;
  for (const side *s = j->sides; s < j->sides + 2; s++) {
    for (int64_t h = 0; h < j->kv_heads; h++) {
      char *to = s->pages + ((page * j->kv_heads + h) * j->page_tokens + offset) * bytes;
      clipped += j->convert(s->from + i * s->token + h * s->head, j->head_dim, j->format, s->scale, to);
    }
  }
  return clipped;
}

static void write_task(void *context, int64_t index) {
  const write_job *j = context;
  int64_t from = index * j->per_task, to = from + j->per_task, clipped = 0;
  for (int64_t b = 0; b < j->sequences; b++) {
    int64_t begin = j->starts[b] > from ? j->starts[b] : from, end = j->starts[b + 1] < to ? j->starts[b + 1] : to;
    for (int64_t i = begin; i < end; i++) clipped += write_token(j, b, i);
  }
  if (clipped && j->clipped) __atomic_fetch_add(j->clipped, clipped, __ATOMIC_RELAXED);
}

void nyb_paged_write(char *keys, char *values, const int32_t *table, const int32_t *starts, const int32_t *lengths,
                     int64_t sequences, int64_t width, int64_t kv_heads, int64_t page_tokens, int64_t head_dim,
                     int format, float key_scale, float value_scale, int64_t *clipped, const float *k, int64_t k_token,
                     int64_t k_head, const float *v, int64_t v_token, int64_t v_head, int isa, int threads) {
  write_job j = {.sides = {{k, k_token, k_head, keys, key_scale}, {v, v_token, v_head, values, value_scale}},
                 .table = table, .starts = starts, .lengths = lengths, .sequences = sequences, .width = width,
                 .kv_heads = kv_heads, .page_tokens = page_tokens, .head_dim = head_dim, .clipped = clipped,
                 .convert = convert_portable, .format = format};
#if defined(__x86_64__)
  if (isa >= NYB_ISA_AVX2) j.convert = isa >= NYB_ISA_AVX512 ? convert_avx512 : convert_avx2;
#else
  (void)isa;
#endif
  int64_t tokens = starts[sequences];
  j.per_task = TASK / (2 * kv_heads * head_dim) + 1;
  nyb_parallel(write_task, &j, (tokens + j.per_task - 1) / j.per_task, threads);
}

NYB_STEP(nyb_paged_write) {
  nyb_paged_write(v[0].p, v[1].p, v[2].p, v[3].p, v[4].p, v[5].n, v[6].n, v[7].n, v[8].n, v[9].n, (int)v[10].n,
                  (float)v[11].f, (float)v[12].f, v[13].p, v[14].p, v[15].n, v[16].n, v[17].p, v[18].n, v[19].n,
                  (int)v[20].n, (int)v[21].n);
  return 0;
}
