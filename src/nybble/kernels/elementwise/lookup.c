/* Rows looked up in a table: embeddings, and the rows of a batch that somebody wants. */
#include <stdint.h>
#include <string.h>

#include "../pool.h"
#include "../program.h"

enum { NYB_F32 = 0, NYB_BF16 = 1, NYB_F16 = 2 }; /* of the table; Python passes these numbers */

#define ALONE 65536 /* elements below which the calling thread is done before a worker wakes */

typedef struct {
  const char *table;
  const int64_t *index;
  float *y;
  int64_t width, stride;
  int dtype;
} lookup_job;

static float of_half(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = h & 0x7fff, bits;
  if (magnitude >= 0x7c00) bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
  else if (magnitude < 0x400) {
    float small = (float)magnitude * 0x1p-24f;
    memcpy(&bits, &small, 4);
    bits |= sign;
  } else bits = sign | ((magnitude << 13) + (112u << 23));
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static void look_up(void *context, int64_t row) {
  const lookup_job *j = context;
  const char *x = j->table + j->index[row] * j->stride;
  float *y = j->y + row * j->width;
  if (j->dtype == NYB_F32) {
    memcpy(y, x, (size_t)j->width * 4);
    return;
  }
  for (int64_t i = 0; i < j->width; i++) {
    uint16_t h;
    memcpy(&h, x + 2 * i, 2);
    uint32_t wide = (uint32_t)h << 16;
    if (j->dtype == NYB_F16) y[i] = of_half(h);
    else memcpy(y + i, &wide, 4);
  }
}

/* y [rows, width] = the rows `index` of a table, `stride` bytes apart, as floats. */
void nyb_look_up(const void *table, int64_t stride, int dtype, const int64_t *index, float *y, int64_t rows,
                 int64_t width, int threads) {
  lookup_job j = {.table = table, .index = index, .y = y, .width = width, .stride = stride, .dtype = dtype};
  nyb_parallel(look_up, &j, rows, rows * width < ALONE ? 1 : threads);
}
NYB_STEP(nyb_look_up) {
  nyb_look_up(v[0].p, v[1].n, (int)v[2].n, v[3].p, v[4].p, v[5].n, v[6].n, (int)v[7].n);
  return 0;
}
