/* Norms, rotary embedding and gated products on rows of float32: threads, instruction sets and entry points.
 * The arithmetic is in rows.h, the definition beside it is reference.py. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../isa.h"
#include "../pool.h"
#include "../program.h"

enum { NYB_PLAIN = 0, NYB_SILU = 1, NYB_SIGMOID = 2 }; /* activations; Python passes these numbers */

#define TASK 8192      /* elements per task, a few microseconds */
#define ALONE (16 * TASK) /* below this the calling thread is done before a worker wakes */

/* Rows of floats, `heads` to a token; strides are in floats. */
typedef struct {
  const float *base;
  int64_t token, head;
} strided;

typedef struct {
  strided x, z;
  const float *weight;
  float *y, *sum;
  int64_t rows, width, heads, half, y_token, per_task;
  float eps, offset;
  int activation, isa;
} rows_job;

#define NYB_BODY "elementwise/rows.h"
#include "../every_isa.h"

#define TASK_OF(function)                                                    \
  static void function##_task(void *context, int64_t index) {                \
    const rows_job *j = context;                                             \
    int64_t from = index * j->per_task, to = from + j->per_task;             \
    if (to > j->rows) to = j->rows;                                          \
    CALL(j->isa, function, j, from, to);                                                          \
  }
TASK_OF(norm_rows)
TASK_OF(add_rows)
TASK_OF(rotary_rows)
TASK_OF(gate_rows)

/* Rows in tasks of about TASK elements; how they are cut changes no result. */
static void run(nyb_task task, rows_job *j, int64_t row, int threads) {
  if (j->rows <= 0 || row <= 0) return;
  j->per_task = row < TASK ? TASK / row : 1;
  if (j->rows * row < ALONE) threads = 1;
  nyb_parallel(task, j, (j->rows + j->per_task - 1) / j->per_task, threads);
}

/* y [tokens, heads, width] = norm(x) * (offset + weight), times activation(z) if there is one (then the offset is 0);
 * x and z are strided, and tokens of y lie `y_token` floats apart. */
void nyb_rms_norm(const float *x, int64_t x_token, int64_t x_head, const float *z, int64_t z_token, int64_t z_head,
                  const float *weight, float *y, int64_t y_token, int64_t tokens, int64_t heads, int64_t width,
                  float eps, float offset, int activation, int isa, int threads) {
  rows_job j = {.x = {x, x_token, x_head}, .z = {z, z_token, z_head}, .weight = weight, .y = y, .y_token = y_token,
                .rows = tokens * heads, .heads = heads, .width = width, .eps = eps, .offset = offset,
                .activation = activation, .isa = isa};
  run(norm_rows_task, &j, width, threads);
}
NYB_STEP(nyb_rms_norm) {
  nyb_rms_norm(v[0].p, v[1].n, v[2].n, v[3].p, v[4].n, v[5].n, v[6].p, v[7].p, v[8].n, v[9].n, v[10].n, v[11].n,
               (float)v[12].f, (float)v[13].f, (int)v[14].n, (int)v[15].n, (int)v[16].n);
  return 0;
}

/* sum = x + z, [rows, width]; with a weight, y = norm(sum) * (offset + weight). */
void nyb_add_norm(const float *x, const float *z, const float *weight, float *sum, float *y, int64_t rows,
                  int64_t width, float eps, float offset, int isa, int threads) {
  rows_job j = {.x = {.base = x}, .z = {.base = z}, .weight = weight, .sum = sum, .y = y, .rows = rows, .width = width,
                .eps = eps, .offset = offset, .isa = isa};
  run(add_rows_task, &j, width, threads);
}
NYB_STEP(nyb_add_norm) {
  nyb_add_norm(v[0].p, v[1].p, v[2].p, v[3].p, v[4].p, v[5].n, v[6].n, (float)v[7].f, (float)v[8].f, (int)v[9].n,
               (int)v[10].n);
  return 0;
}

/* x [tokens, heads, width], strided, in place; cos and sin [tokens, half]. */
void nyb_rotary(float *x, int64_t x_token, int64_t x_head, const float *cos, const float *sin, int64_t tokens,
                int64_t heads, int64_t half, int isa, int threads) {
  rows_job j = {.x = {.token = x_token, .head = x_head}, .z = {.base = cos}, .weight = sin, .y = x, .rows = tokens,
                .heads = heads, .half = half, .isa = isa};
  run(rotary_rows_task, &j, heads * 2 * half, threads);
}
NYB_STEP(nyb_rotary) {
  nyb_rotary(v[0].p, v[1].n, v[2].n, v[3].p, v[4].p, v[5].n, v[6].n, v[7].n, (int)v[8].n, (int)v[9].n);
  return 0;
}

/* y [rows, width] = silu(x[:, :width]) * x[:, width:]. */
void nyb_silu_mul(const float *x, float *y, int64_t rows, int64_t width, int isa, int threads) {
  rows_job j = {.x = {x, 2 * width, 0}, .y = y, .rows = rows, .heads = 1, .width = width, .activation = NYB_SILU,
                .isa = isa};
  run(gate_rows_task, &j, width, threads);
}
NYB_STEP(nyb_silu_mul) {
  nyb_silu_mul(v[0].p, v[1].p, v[2].n, v[3].n, (int)v[4].n, (int)v[5].n);
  return 0;
}

/* y = x * sigmoid(gate), [tokens, heads, width]; x and gate are strided, y is not. */
void nyb_sigmoid_mul(const float *x, int64_t x_token, int64_t x_head, const float *gate, int64_t gate_token,
                     int64_t gate_head, float *y, int64_t tokens, int64_t heads, int64_t width, int isa, int threads) {
  rows_job j = {.x = {x, x_token, x_head}, .z = {gate, gate_token, gate_head}, .y = y, .rows = tokens * heads,
                .heads = heads, .width = width, .activation = NYB_SIGMOID, .isa = isa};
  run(gate_rows_task, &j, width, threads);
}
NYB_STEP(nyb_sigmoid_mul) {
  nyb_sigmoid_mul(v[0].p, v[1].n, v[2].n, v[3].p, v[4].n, v[5].n, v[6].p, v[7].n, v[8].n, v[9].n, (int)v[10].n,
                  (int)v[11].n);
  return 0;
}
