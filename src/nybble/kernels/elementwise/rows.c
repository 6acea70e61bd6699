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

enum { NYB_PLAIN = 0, NYB_SILU = 1, NYB_SIGMOID = 2 }; /* activations; Python passes these numbers */

#define TASK 8192      /* elements per task, a few microseconds */
#define ALONE (16 * TASK) /* below this the calling thread is done before a worker wakes */

typedef struct {
  const float *x, *weight, *z;
  float *y;
  int64_t rows, width, heads, half, per_task;
  float eps, offset;
  int activation, isa;
} rows_job;

#define NYB_AVX512 0
#define NYB_AVX2 0
#include "floats.h"
#include "rows.h"
#if defined(__x86_64__)
#undef NYB_AVX2
#define NYB_AVX2 1
#include "floats.h"
#include "rows.h"
#undef NYB_AVX2
#undef NYB_AVX512
#define NYB_AVX2 0
#define NYB_AVX512 1
#include "floats.h"
#include "rows.h"
#define CALL(function)                                                       \
  if (j->isa >= NYB_ISA_AVX512) function##_avx512(j, from, to);              \
  else if (j->isa >= NYB_ISA_AVX2) function##_avx2(j, from, to);             \
  else function##_portable(j, from, to)
#else
#define CALL(function) function##_portable(j, from, to)
#endif

#define TASK_OF(function)                                                    \
  static void function##_task(void *context, int64_t index) {                \
    const rows_job *j = context;                                             \
    int64_t from = index * j->per_task, to = from + j->per_task;             \
    if (to > j->rows) to = j->rows;                                          \
    CALL(function);                                                          \
  }
TASK_OF(norm_rows)
TASK_OF(rotary_rows)
TASK_OF(gate_rows)

/* Rows in tasks of about TASK elements; how they are cut changes no result. */
static void run(nyb_task task, rows_job *j, int64_t row, int threads) {
  if (j->rows <= 0 || row <= 0) return;
  j->per_task = row < TASK ? TASK / row : 1;
  if (j->rows * row < ALONE) threads = 1;
  nyb_parallel(task, j, (j->rows + j->per_task - 1) / j->per_task, threads);
}

/* y [rows, width] = norm(x) * (offset + weight), times activation(z) if there is one (then the offset is 0). */
void nyb_rms_norm(const float *x, const float *z, const float *weight, float *y, int64_t rows, int64_t width, float eps,
                  float offset, int activation, int isa, int threads) {
  rows_job j = {.x = x, .z = z, .weight = weight, .y = y, .rows = rows, .width = width, .eps = eps, .offset = offset,
                .activation = activation, .isa = isa};
  run(norm_rows_task, &j, width, threads);
}

/* x [tokens, heads, width] in place; cos and sin [tokens, half]. */
void nyb_rotary(float *x, const float *cos, const float *sin, int64_t tokens, int64_t heads, int64_t width,
                int64_t half, int isa, int threads) {
  rows_job j = {.x = cos, .z = sin, .y = x, .rows = tokens, .heads = heads, .width = width, .half = half, .isa = isa};
  run(rotary_rows_task, &j, heads * 2 * half, threads);
}

/* y [rows, width] = silu(x[:, :width]) * x[:, width:]. */
void nyb_silu_mul(const float *x, float *y, int64_t rows, int64_t width, int isa, int threads) {
  rows_job j = {.x = x, .y = y, .rows = rows, .width = width, .activation = NYB_SILU, .isa = isa};
  run(gate_rows_task, &j, width, threads);
}

/* y = x * sigmoid(gate), [rows, width] all. */
void nyb_sigmoid_mul(const float *x, const float *gate, float *y, int64_t rows, int64_t width, int isa, int threads) {
  rows_job j = {.x = x, .z = gate, .y = y, .rows = rows, .width = width, .activation = NYB_SIGMOID, .isa = isa};
  run(gate_rows_task, &j, width, threads);
}
