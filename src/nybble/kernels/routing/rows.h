/* Weights of experts and sums of their outputs for one instruction set: see ../elementwise/floats.h. */
#include "../elementwise/floats.h"

#define LEFT(at, n) ((n) - (at) < LANES ? (int)((n) - (at)) : LANES)
#define VECTORS 4 /* of a row that are summed side by side */

/* The sum of exp(x - largest); lanes beyond the row add exp(-infinity). */
FN float NAME(softmax_sum)(const float *x, int64_t n, float largest) {
  vf sum = v_all(0), top = v_all(largest);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) sum += v_exp(v_load(x + i) - top);
  if (i < n) {
    float rest[LANES];
    for (int k = 0; k < LANES; k++) rest[k] = i + k < n ? x[i + k] : -INFINITY;
    sum += v_exp(v_load(rest) - top);
  }
  return v_sum(sum);
}

/* Softmax weights of the chosen experts of tokens [from, to); the first choice has the largest logit. */
KERNEL void NAME(weigh)(const choose_job *j, int64_t from, int64_t to) {
  int64_t top = j->top;
  for (int64_t t = from; t < to; t++) {
    const float *x = j->logits + t * j->logits_row;
    const int32_t *chosen = j->chosen + t * top;
    float *weights = j->weights + t * top, largest = x[chosen[0]], total = 0;
    float sum = NAME(softmax_sum)(x, j->experts, largest);
    for (int64_t i = 0; i < top; i++) weights[i] = x[chosen[i]] - largest;
    for (int64_t i = 0; i < top; i += LANES) {
      int some = LEFT(i, top);
      v_store_some(weights + i, v_exp(v_load_some(weights + i, some)) / v_all(sum), some);
    }
    for (int64_t i = 0; i < top; i++) total += weights[i];
    for (int64_t i = 0; j->normalises && i < top; i++) weights[i] /= total;
  }
}

/* Columns of a token's sum; products are rounded before they are added, as in the definition. */
FN void NAME(combine_columns)(const combine_job *j, int64_t token, int64_t at, int vectors, int last, float share) {
#define IN(p, c) ((c) == vectors - 1 && last < LANES ? v_load_some((p) + (c) * LANES, last) : v_load((p) + (c) * LANES))
  const float *weights = j->weights + token * j->top;
  const int32_t *places = j->places + token * j->top;
  vf sum[VECTORS];
  for (int c = 0; c < vectors; c++) sum[c] = v_all(-0.0f); /* adding to it changes no bit */
  for (int64_t i = 0; i < j->top; i++) {
    const float *part = j->parts + places[i] * j->width + at;
    vf weight = v_all(weights[i]);
    for (int c = 0; c < vectors; c++) {
      vf product = IN(part, c) * weight;
      sum[c] += product;
    }
  }
  if (j->shared) {
    const float *part = j->shared + token * j->shared_row + at;
    for (int c = 0; c < vectors; c++) sum[c] += IN(part, c) * v_all(share);
  }
  float *y = j->y + token * j->width + at;
  for (int c = 0; c < vectors; c++) {
    if (c == vectors - 1 && last < LANES) v_store_some(y + c * LANES, sum[c], last);
    else v_store(y + c * LANES, sum[c]);
  }
#undef IN
}

KERNEL void NAME(combine_rows)(const combine_job *j, int64_t from, int64_t to) {
  for (int64_t t = from; t < to; t++) {
    float share = 0;
    if (j->shared) v_store_some(&share, v_sigmoid(v_all(j->gate[t * j->gate_row])), 1);
    for (int64_t x = 0; x < j->width;) {
      if (j->width - x >= VECTORS * LANES) {
        NAME(combine_columns)(j, t, x, VECTORS, LANES, share);
        x += VECTORS * LANES;
      } else {
        NAME(combine_columns)(j, t, x, 1, LEFT(x, j->width), share);
        x += LANES;
      }
    }
  }
}
#undef LEFT
#undef VECTORS
