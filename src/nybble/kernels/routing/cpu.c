/* Routing between the matmuls of a mixture of experts: threads, instruction sets and entry points. The arithmetic is
 * in rows.h, the definition beside it is reference.py. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../isa.h"
#include "../pool.h"
#include "../program.h"

#define MOST_CHOICES 64   /* experts of a token; Python checks */
#define TASK 16384        /* floats per task, a few microseconds */
#define ALONE (32 * TASK) /* below this the calling thread is done before a worker wakes */

/* How many rows of so many floats a task takes. */
static int64_t rows_of_task(int64_t floats) { return floats < TASK ? TASK / floats : 1; }

typedef struct {
  const float *logits;
  float *weights;
  int32_t *chosen;
  int64_t logits_row, tokens, experts, top, per_task;
  int normalises, isa;
} choose_job;

typedef struct {
  const float *x;
  const int32_t *order;
  float *y;
  int64_t x_row, rows, top, width, per_task;
} gather_job;

typedef struct {
  const float *parts, *weights, *shared, *gate;
  const int32_t *places;
  float *y;
  int64_t shared_row, gate_row, tokens, top, width, per_task;
  int isa;
} combine_job;

/* A number that is larger for the likelier expert: floats in their order with NaN above infinity and both zeros
 * alike, then the lower expert. */
static inline uint64_t rank_of(float logit, int64_t expert) {
  float value = logit + 0.0f;
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  uint32_t flips = (0u - (bits >> 31)) | 0x80000000u; /* no branch: signs come at random */
  uint32_t key = value != value ? UINT32_MAX : bits ^ flips;
  return (uint64_t)key << 32 | (uint32_t)~(uint32_t)expert;
}

/* The experts of one token, the likeliest first. */
static void choose(const float *logits, int64_t experts, int64_t top, int32_t *chosen) {
  uint64_t best[MOST_CHOICES] = {0}; /* no expert ranks as low as 0 */
  for (int64_t e = 0; e < experts; e++) {
    uint64_t rank = rank_of(logits[e], e);
    if (rank < best[top - 1]) continue;
    int64_t at = top - 1;
    for (; at > 0 && best[at - 1] < rank; at--) best[at] = best[at - 1];
    best[at] = rank;
  }
  for (int64_t i = 0; i < top; i++) chosen[i] = (int32_t)~(uint32_t)best[i];
}

#define NYB_BODY "routing/rows.h"
#include "../every_isa.h"

static void choose_task(void *context, int64_t index) {
  const choose_job *j = context;
  int64_t from = index * j->per_task, to = from + j->per_task < j->tokens ? from + j->per_task : j->tokens;
  for (int64_t t = from; t < to; t++)
    choose(j->logits + t * j->logits_row, j->experts, j->top, j->chosen + t * j->top);
  CALL(j->isa, weigh, j, from, to);
}

/* Counts of rows, the entry of every row, and the row of every entry: a counting sort, which is stable. */
static void sort_entries(const int32_t *chosen, int64_t entries, int64_t *counts, int64_t experts, int32_t *order,
                         int32_t *places) {
  memset(counts, 0, (size_t)experts * sizeof *counts);
  for (int64_t i = 0; i < entries; i++) counts[chosen[i]]++;
  int64_t start = 0;
  for (int64_t e = 0; e < experts; e++) {
    int64_t count = counts[e];
    counts[e] = start;
    start += count;
  }
  for (int64_t i = 0; i < entries; i++) {
    int64_t row = counts[chosen[i]]++;
    order[row] = (int32_t)i;
    places[i] = (int32_t)row;
  }
  for (int64_t e = experts - 1; e > 0; e--) counts[e] -= counts[e - 1]; /* from ends back to counts */
}

/* Shapes as in Python. */
void nyb_route(const float *logits, int64_t logits_row, float *weights, int32_t *chosen, int64_t *counts,
               int32_t *order, int32_t *places, int64_t tokens, int64_t experts, int64_t top, int normalises, int isa,
               int threads) {
  choose_job j = {.logits = logits, .weights = weights, .chosen = chosen, .logits_row = logits_row, .tokens = tokens,
                  .experts = experts, .top = top, .per_task = rows_of_task(4 * experts), .normalises = normalises,
                  .isa = isa};
  if (tokens * experts < ALONE / 16) threads = 1; /* an expert takes longer than a float that is moved */
  nyb_parallel(choose_task, &j, (tokens + j.per_task - 1) / j.per_task, threads);
  sort_entries(chosen, tokens * top, counts, experts, order, places);
}
NYB_STEP(nyb_route) {
  nyb_route(v[0].p, v[1].n, v[2].p, v[3].p, v[4].p, v[5].p, v[6].p, v[7].n, v[8].n, v[9].n, (int)v[10].n,
            (int)v[11].n, (int)v[12].n);
  return 0;
}

static void gather_task(void *context, int64_t index) {
  const gather_job *j = context;
  int64_t from = index * j->per_task, to = from + j->per_task < j->rows ? from + j->per_task : j->rows;
  for (int64_t i = from; i < to; i++)
    memcpy(j->y + i * j->width, j->x + j->order[i] / j->top * j->x_row, (size_t)j->width * sizeof(float));
}

/* y [rows, width] = the token of every row. */
void nyb_gather(const float *x, int64_t x_row, const int32_t *order, float *y, int64_t rows, int64_t top,
                int64_t width, int threads) {
  if (!width) return;
  gather_job j = {.x = x, .order = order, .y = y, .x_row = x_row, .rows = rows, .top = top, .width = width,
                  .per_task = rows_of_task(width)};
  if (rows * width < ALONE) threads = 1;
  nyb_parallel(gather_task, &j, (rows + j.per_task - 1) / j.per_task, threads);
}
NYB_STEP(nyb_gather) {
  nyb_gather(v[0].p, v[1].n, v[2].p, v[3].p, v[4].n, v[5].n, v[6].n, (int)v[7].n);
  return 0;
}

static void combine_task(void *context, int64_t index) {
  const combine_job *j = context;
  int64_t from = index * j->per_task, to = from + j->per_task < j->tokens ? from + j->per_task : j->tokens;
  CALL(j->isa, combine_rows, j, from, to);
}

/* shared and gate may be NULL; shapes as in Python. */
void nyb_combine(const float *parts, const float *weights, const int32_t *places, const float *shared,
                 int64_t shared_row, const float *gate, int64_t gate_row, float *y, int64_t tokens, int64_t top,
                 int64_t width, int isa, int threads) {
  if (!width) return;
  combine_job j = {.parts = parts, .weights = weights, .shared = shared, .gate = gate, .places = places, .y = y,
                   .shared_row = shared_row, .gate_row = gate_row, .tokens = tokens, .top = top, .width = width,
                   .per_task = rows_of_task(top * width), .isa = isa};
  if (tokens * top * width < ALONE) threads = 1;
  nyb_parallel(combine_task, &j, (tokens + j.per_task - 1) / j.per_task, threads);
}
NYB_STEP(nyb_combine) {
  nyb_combine(v[0].p, v[1].p, v[2].p, v[3].p, v[4].n, v[5].p, v[6].n, v[7].p, v[8].n, v[9].n, v[10].n,
              (int)v[11].n, (int)v[12].n);
  return 0;
}
