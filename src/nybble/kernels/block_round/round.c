/* Blocks of a strip rounded in a quadratic metric: threads, instruction sets and the entry point. The arithmetic is in
 * rows.h, the definition beside it is reference.py. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../isa.h"
#include "../pool.h"

#define BLOCK 16
#define MOST_COLUMNS 128
#define MOST_KEPT 4
#define ZERO_BLOCK 0x38 /* E4M3 1.0 */

/* The metric of one block, from its part of U and D. */
typedef struct {
  float before[BLOCK][BLOCK]; /* [k][i] is U_ik for i < k, else 0 */
  float metric[BLOCK][BLOCK]; /* M = U diag(D) U^T; this and what follows only for passes */
  float slope[BLOCK][BLOCK];  /* U diag(D) */
  float step[BLOCK];          /* 1 / diag(M) */
} block_metric;

/* Shapes as in Python; the current ones are NULL where there are none. */
typedef struct {
  const float *weight, *target, *upper, *importance;
  const block_metric *metrics; /* [columns / BLOCK] */
  const uint8_t *current_codes, *current_scales;
  uint8_t *codes, *scales;
  float *error, *loss;
  int64_t weight_row, target_row, upper_row, rows, columns;
  int lowest, highest, passes, kept, isa;
} round_job;

static const float e2m1_values[16] = {0, .5f, 1, 1.5f, 2, 3, 4, 6, 0, -.5f, -1, -1.5f, -2, -3, -4, -6};

#define NYB_BODY "block_round/rows.h"
#include "../every_isa.h"

/* As many rows as a vector has lanes. */
static int64_t rows_of_group(int isa) {
#if defined(__x86_64__)
  if (isa >= NYB_ISA_AVX512) return 16;
#endif
  (void)isa;
  return 8;
}

static void round_task(void *context, int64_t index) {
  const round_job *j = context;
  int64_t from = index * rows_of_group(j->isa);
  CALL(j->isa, round_rows, j, from);
}

/* As `descent` of the definition has it, in its order; sums in double. */
static void measure_block(const float *upper, int64_t row, const float *importance, int passes, block_metric *m) {
  for (int k = 0; k < BLOCK; k++)
    for (int i = 0; i < BLOCK; i++) m->before[k][i] = i < k ? upper[i * row + k] : 0;
  if (!passes) return;
  for (int i = 0; i < BLOCK; i++)
    for (int k = 0; k < BLOCK; k++) m->slope[i][k] = i < k ? m->before[k][i] * importance[k] : i > k ? 0 : importance[k];
  for (int i = 0; i < BLOCK; i++)
    for (int l = 0; l < BLOCK; l++) {
      double sum = 0;
      for (int k = l; k < BLOCK; k++) sum += (double)m->slope[i][k] * (k == l ? 1 : m->before[k][l]);
      m->metric[i][l] = (float)sum;
      if (i == l) m->step[i] = (float)(1 / sum);
    }
}

void nyb_block_round(const float *weight, int64_t weight_row, const float *target, int64_t target_row,
                     const float *upper, int64_t upper_row, const float *importance, const uint8_t *current_codes,
                     const uint8_t *current_scales, uint8_t *codes, uint8_t *scales, float *error, float *loss,
                     int64_t rows, int64_t columns, int lowest, int highest, int passes, int kept, int isa,
                     int threads) {
  block_metric metrics[MOST_COLUMNS / BLOCK];
  round_job j = {.weight = weight, .target = target, .upper = upper, .importance = importance, .metrics = metrics,
                 .current_codes = current_codes, .current_scales = current_scales, .codes = codes, .scales = scales,
                 .error = error, .loss = loss, .weight_row = weight_row, .target_row = target_row,
                 .upper_row = upper_row, .rows = rows, .columns = columns, .lowest = lowest, .highest = highest,
                 .passes = passes, .kept = kept, .isa = isa};
  for (int64_t b = 0; b < columns / BLOCK; b++)
    measure_block(upper + b * BLOCK * (upper_row + 1), upper_row, importance + b * BLOCK, passes, &metrics[b]);
  int64_t group = rows_of_group(isa);
  nyb_parallel(round_task, &j, (rows + group - 1) / group, threads);
}
