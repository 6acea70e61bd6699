/* Kernels on rows of floats for one instruction set: see floats.h. */
#include "floats.h"

#define LEFT(at, n) ((n) - (at) < LANES ? (int)((n) - (at)) : LANES)

/* Squares of a row, summed in four vectors side by side, then those, then their lanes. */
FN float NAME(squares)(const float *x, int64_t n) {
  vf a[4] = {v_all(0), v_all(0), v_all(0), v_all(0)};
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int j = 0; j < 4; j++) {
      vf v = v_load(x + i + j * LANES);
      a[j] = v_fma(v, v, a[j]);
    }
  for (; i < n; i += LANES) {
    vf v = v_load_some(x + i, LEFT(i, n));
    a[0] = v_fma(v, v, a[0]);
  }
  return v_sum((a[0] + a[1]) + (a[2] + a[3]));
}

FN vf NAME(normed)(vf x, vf w, vf z, vf scale, vf offset, int activation) {
  vf y = x * scale * (offset + w);
  if (activation == NYB_SILU) y *= v_silu(z);
  if (activation == NYB_SIGMOID) y *= v_sigmoid(z);
  return y;
}

FN void NAME(norm_row)(const float *x, const float *w, const float *z, float *y, int64_t n, float eps, float offset,
                       int activation) {
  vf scale = v_all(1.0f / sqrtf(NAME(squares)(x, n) / (float)n + eps)), shift = v_all(offset);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    vf gate = activation ? v_load(z + i) : shift;
    v_store(y + i, NAME(normed)(v_load(x + i), v_load(w + i), gate, scale, shift, activation));
  }
  if (i < n) {
    int some = LEFT(i, n);
    vf gate = activation ? v_load_some(z + i, some) : shift;
    vf made = NAME(normed)(v_load_some(x + i, some), v_load_some(w + i, some), gate, scale, shift, activation);
    v_store_some(y + i, made, some);
  }
}

/* Row r of strided rows: `heads` of them in each token. */
FN const float *NAME(row_of)(const strided *s, int64_t r, int64_t heads) {
  return s->base + r / heads * s->token + r % heads * s->head;
}

KERNEL void NAME(norm_rows)(const rows_job *j, int64_t from, int64_t to) {
  int64_t n = j->width;
  for (int64_t r = from; r < to; r++) {
    const float *x = NAME(row_of)(&j->x, r, j->heads), *z = j->activation ? NAME(row_of)(&j->z, r, j->heads) : NULL;
    float *y = j->y + r / j->heads * j->y_token + r % j->heads * n;
    if (j->activation == NYB_SILU) NAME(norm_row)(x, j->weight, z, y, n, j->eps, 0.0f, NYB_SILU);
    else if (j->activation) NAME(norm_row)(x, j->weight, z, y, n, j->eps, 0.0f, NYB_SIGMOID);
    else NAME(norm_row)(x, j->weight, z, y, n, j->eps, j->offset, NYB_PLAIN);
  }
}

/* sum = x + z, and y = norm(sum) where there is a weight. */
KERNEL void NAME(add_rows)(const rows_job *j, int64_t from, int64_t to) {
  int64_t n = j->width;
  for (int64_t r = from; r < to; r++) {
    const float *x = j->x.base + r * n, *z = j->z.base + r * n;
    float *sum = j->sum + r * n;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) v_store(sum + i, v_load(x + i) + v_load(z + i));
    if (i < n) v_store_some(sum + i, v_load_some(x + i, LEFT(i, n)) + v_load_some(z + i, LEFT(i, n)), LEFT(i, n));
    if (j->weight) NAME(norm_row)(sum, j->weight, NULL, j->y + r * n, n, j->eps, j->offset, NYB_PLAIN);
  }
}

/* Rows are tokens here: each has `heads` heads of `width` dims, and one row of cos and of sin. */
KERNEL void NAME(rotary_rows)(const rows_job *j, int64_t from, int64_t to) {
  for (int64_t t = from; t < to; t++)
    for (int64_t h = 0; h < j->heads; h++) {
      float *low = j->y + t * j->x.token + h * j->x.head, *high = low + j->half;
      const float *cos = j->z.base + t * j->half, *sin = j->weight + t * j->half;
      for (int64_t i = 0; i < j->half; i += LANES) {
        int some = LEFT(i, j->half);
        vf a = v_load_some(low + i, some), b = v_load_some(high + i, some);
        vf c = v_load_some(cos + i, some), s = v_load_some(sin + i, some);
        v_store_some(low + i, a * c - b * s, some);
        v_store_some(high + i, b * c + a * s, some);
      }
    }
}

/* y = activation(gate) * x; gate and x of a row are `width` each. */
FN void NAME(gate_row)(const float *gate, const float *x, float *y, int64_t n, int activation) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    vf g = v_load(gate + i);
    v_store(y + i, v_load(x + i) * (activation == NYB_SILU ? v_silu(g) : v_sigmoid(g)));
  }
  if (i < n) {
    int some = LEFT(i, n);
    vf g = v_load_some(gate + i, some);
    v_store_some(y + i, v_load_some(x + i, some) * (activation == NYB_SILU ? v_silu(g) : v_sigmoid(g)), some);
  }
}

KERNEL void NAME(gate_rows)(const rows_job *j, int64_t from, int64_t to) {
  int64_t n = j->width;
  for (int64_t r = from; r < to; r++) {
    const float *x = NAME(row_of)(&j->x, r, j->heads);
    float *y = j->y + r * n;
    if (j->activation == NYB_SILU) NAME(gate_row)(x, x + n, y, n, NYB_SILU);
    else NAME(gate_row)(NAME(row_of)(&j->z, r, j->heads), x, y, n, NYB_SIGMOID);
  }
}
#undef LEFT
