/* Four-bit weights times rows of x in INT8, in portable C: as blocks.h does it with four lanes. */

enum { PLAIN_PIECE = 32 }; /* chunks of 64 */

typedef struct {
  int8_t values[4][16]; /* doubled weights */
  float scale[4];
} plain_decoded;

static void fill_plain(const nyb_segment *s, int64_t row, int64_t from, int64_t to, int64_t k, plain_decoded *out) {
  const int is_mx = s->format == NYB_WEIGHT_MXFP4;
  const uint8_t *codes = s->codes + row * s->row_bytes, *scales = s->scale + row * (k / (is_mx ? 32 : 16));
  for (int64_t at = from; at < to; at += 64, out++) {
    memset(out, 0, sizeof *out);
    for (int b = 0; b < 4 && at + 16 * b < k; b++) {
      const int64_t block = at + 16 * b;
      out->scale[b] = is_mx ? float_of((uint32_t)tables.mxfp4[scales[block / 32]][2] << 16)
                            : tables.e4m3_float[scales[block / 16]];
      for (int i = 0; i < 8; i++) {
        const uint8_t code = codes[block / 2 + i];
        out->values[b][2 * i] = (int8_t)(raised_values[code & 15] - 12);
        out->values[b][2 * i + 1] = (int8_t)(raised_values[code >> 4] - 12);
      }
    }
  }
}

/* Decoded chunks times a packed row of x, added to four sums. */
static void multiply_plain(const plain_decoded *w, int64_t chunks, const char *x, float sums[4]) {
  for (; chunks; chunks--, w++, x += INT8_CHUNK)
    for (int b = 0; b < 4; b++) {
      const int8_t *v = (const int8_t *)x + 16 * b;
      int32_t dot = 0;
      for (int i = 0; i < 16; i++) dot += (int16_t)(w->values[b][i] * v[i]);
      sums[b] += (float)dot * (w->scale[b] * load_float((const uint8_t *)x + 80 + 4 * b));
    }
}

static void run_blocks_portable(const task *t) {
  plain_decoded tile[PLAIN_PIECE];
  float sums[BLOCK_ROWS][4];
  for (int64_t row = t->row; row < t->end; row++) {
    const float scale = row_scale(t->segment, row), bias = row_bias(t->segment, row);
    memset(sums, 0, sizeof sums);
    for (int64_t at = 0; at < t->k; at += 64 * PLAIN_PIECE) {
      const int64_t to = at + 64 * PLAIN_PIECE < t->k ? at + 64 * PLAIN_PIECE : t->k;
      fill_plain(t->segment, row, at, to, t->k, tile);
      for (int64_t i = 0; i < t->rows; i++)
        multiply_plain(tile, (to - at + 63) / 64, t->x + i * t->x_stride + at / 64 * INT8_CHUNK, sums[i]);
    }
    for (int64_t i = 0; i < t->rows; i++)
      t->y[i * t->n + row] = ((sums[i][0] + sums[i][2]) + (sums[i][1] + sums[i][3])) * scale + bias;
  }
}
