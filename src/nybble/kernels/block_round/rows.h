/* Blocks rounded in lanes: lane l of a vector belongs to row l of a group, the columns of a strip follow one another in
 * time. Every product and sum is rounded by itself, in the order of the definition, so all instruction sets agree to
 * the bit. Included once per instruction set. */
#include "../block_quantize/lanes.h"

#undef APART
#define APART __attribute__((noinline)) KERNEL
#define SIDE_BY_SIDE 4 /* scales tried at once: a column waits for the one before it, another scale does not */

/* What a block of these rows is rounded to. */
#undef block
#define block NAME(block)
typedef struct {
  const vf *left, *weight;                                /* [16]: target before the block's own errors; W */
  const float *importance;
  const block_metric *metric;
} block;

/* A block, rounded: the scale's code, values Q, errors Q - W, loss. */
#undef rounded
#define rounded NAME(rounded)
typedef struct {
  vi scale;
  vf q[BLOCK], error[BLOCK], loss;
} rounded;

#if NYB_AVX512
/* Sixteen rows of sixteen become columns. */
FN void NAME(transpose)(vf *x) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 4) {
    __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(x[i], x[i + 1]));
    __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(x[i], x[i + 1]));
    __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(x[i + 2], x[i + 3]));
    __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(x[i + 2], x[i + 3]));
    t[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    t[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    t[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    t[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
  for (int c = 0; c < 4; c++) { /* quarter q of t[i + c] is column 4 q + c of rows i to i + 3 */
    __m512 even_low = _mm512_shuffle_f32x4(t[c], t[4 + c], 0x88), odd_low = _mm512_shuffle_f32x4(t[c], t[4 + c], 0xdd);
    __m512 even_high = _mm512_shuffle_f32x4(t[8 + c], t[12 + c], 0x88);
    __m512 odd_high = _mm512_shuffle_f32x4(t[8 + c], t[12 + c], 0xdd);
    x[c] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    x[4 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    x[8 + c] = _mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    x[12 + c] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
}
#endif

/* The nearest E2M1 value, ties to even, saturating; +0 for what vanishes. Magnitudes below 2 lie on a grid of 1/2,
 * below 4 of 1, above of 2: adding 1.5 * 2^23 grid steps rounds to the grid. */
FN vf NAME(e2m1_nearest)(vf t) {
#if NYB_AVX512
  t = _mm512_range_ps(t, f_all(6.0f), 2); /* the lesser magnitude, the sign of t */
#else
  t = f_max(f_min(t, f_all(6.0f)), f_all(-6.0f));
#endif
  vi e = i_max(i_and(bits(t), i_all(0x7f800000)), i_all(0x3f800000)); /* 2^floor(log2 |t|), at least 1 */
  vf m = from_bits(i_add(e, i_all((22 << 23) | 0x00400000)));        /* 1.5 * 2^23 steps */
  return f_sub(f_add(t, m), m);
}

/* The code of an E2M1 value, one step of its grid more or less each time an exponent changes. */
FN vi NAME(e2m1_code)(vf value) {
  vf magnitude = f_abs(value);
  vi e = i_max(i_and(bits(magnitude), i_all(0x7f800000)), i_all(0x3f800000));
  vf m = from_bits(i_add(e, i_all((22 << 23) | 0x00400000)));
  vi code = i_add(i_and(bits(f_add(magnitude, m)), i_all(7)), i_right(i_sub(e, i_all(0x3f800000)), 22));
  return i_or_where(f_less(value, f_all(0.0f)), code, i_all(8));
}

/* The float value of E4M3 codes 1..126. */
FN vf NAME(e4m3_value)(vi code) {
  vf normal = from_bits(i_add(i_left(code, 20), i_all(120 << 23)));
  vf subnormal = f_mul(to_float(code), f_all(0x1p-9f));
  return f_pick(i_less(code, i_all(8)), subnormal, normal);
}

/* The E4M3 code nearest to 2^-9 <= r <= 448, ties to even. */
FN vi NAME(e4m3_nearest)(vf r) {
  vi b = bits(r);
  vi odd = i_and(i_right(b, 20), i_all(1));
  vi normal = i_sub(i_right(i_add(b, i_add(i_all(0x7ffff), odd)), 20), i_all(120 << 3));
  vf steps = f_add(f_mul(f_min(r, f_all(1.0f)), f_all(512.0f)), f_all(0x1.8p23f));
  vi subnormal = i_and(bits(steps), i_all(0x3ff));
  return i_pick(f_less(r, f_all(0x1p-6f)), subnormal, normal);
}

/* Errors that are read before they are known, times 0, must be numbers. */
FN void NAME(clear)(vf (*error)[SIDE_BY_SIDE], const int wide) {
  for (int i = 0; i < BLOCK; i++)
    for (int w = 0; w < wide; w++) error[i][w] = f_all(0.0f);
}

/* What the errors of the block's columns before k leave of target k, for `wide` sets of errors. Four columns at a time:
 * U is 0 from the diagonal on, and what lies there of `error` a number. */
FN void NAME(leave)(const block *b, int k, const int wide, const vf (*error)[SIDE_BY_SIDE], vf *v) {
  for (int w = 0; w < wide; w++) v[w] = b->left[k];
#pragma GCC unroll 1
  for (int from = 0; from < k; from += 4)
#pragma GCC unroll 4
    for (int i = from; i < from + 4; i++) {
      vf u = f_all(b->metric->before[k][i]);
#pragma GCC unroll 4
      for (int w = 0; w < wide; w++) v[w] = f_sub(v[w], f_mul(error[i][w], u));
    }
}

/* The scales with the least loss, the smaller at a tie, the best first: codes [kept]. */
APART void NAME(search)(const block *b, vi first, int lowest, int highest, int kept, vi *best) {
  vf least[MOST_KEPT], error[BLOCK][SIDE_BY_SIDE];
  NAME(clear)(error, SIDE_BY_SIDE);
  for (int p = 0; p < kept; p++) {
    least[p] = f_all(__builtin_inff());
    best[p] = i_max(i_min(i_add(first, i_all(lowest)), i_all(126)), i_all(1));
  }
  for (int c = lowest; c <= highest; c += SIDE_BY_SIDE) {
    vi code[SIDE_BY_SIDE];
    vf s[SIDE_BY_SIDE], inverse[SIDE_BY_SIDE], loss[SIDE_BY_SIDE], v[SIDE_BY_SIDE];
    for (int w = 0; w < SIDE_BY_SIDE; w++) {
      code[w] = i_max(i_min(i_add(first, i_all(c + w)), i_all(126)), i_all(1));
      s[w] = NAME(e4m3_value)(code[w]);
      inverse[w] = f_div(f_all(1.0f), s[w]);
      loss[w] = f_all(0.0f);
    }
#pragma GCC unroll 1
    for (int k = 0; k < BLOCK; k++) {
      NAME(leave)(b, k, SIDE_BY_SIDE, error, v);
      vf weight = b->weight[k], importance = f_all(b->importance[k]);
      for (int w = 0; w < SIDE_BY_SIDE; w++) {
        vf q = f_mul(s[w], NAME(e2m1_nearest)(f_mul(v[w], inverse[w])));
        vf miss = f_sub(q, v[w]);
        error[k][w] = f_sub(q, weight);
        loss[w] = f_add(loss[w], f_mul(f_mul(miss, miss), importance));
      }
    }
    for (int w = 0; w < SIDE_BY_SIDE && c + w <= highest; w++)
      for (int p = kept - 1; p >= 0; p--) { /* what is worse moves down a place */
        vf above = p ? least[p - 1] : loss[w];
        vi above_code = p ? best[p - 1] : code[w];
        vm here = f_less(loss[w], least[p]), higher = f_less(loss[w], above);
        best[p] = i_pick(here, i_pick(higher, above_code, code[w]), best[p]);
        least[p] = f_pick(here, f_pick(higher, above, loss[w]), least[p]);
      }
  }
}

/* Codes of `wide` scales from quotients, or, where `given`, values q as they are. */
FN void NAME(settle)(const block *b, const int wide, const vf *s, const int given, vf (*q)[SIDE_BY_SIDE],
                     vf (*error)[SIDE_BY_SIDE], vf (*miss)[SIDE_BY_SIDE], vf *loss) {
  vf v[SIDE_BY_SIDE];
  NAME(clear)(error, wide);
  for (int w = 0; w < wide; w++) loss[w] = f_all(0.0f);
#pragma GCC unroll 1
  for (int k = 0; k < BLOCK; k++) {
    NAME(leave)(b, k, wide, error, v);
    vf importance = f_all(b->importance[k]);
    for (int w = 0; w < wide; w++) {
      if (!given) q[k][w] = f_mul(s[w], NAME(e2m1_nearest)(f_div(v[w], s[w])));
      error[k][w] = f_sub(q[k][w], b->weight[k]);
      miss[k][w] = f_sub(q[k][w], v[w]);
      loss[w] = f_add(loss[w], f_mul(f_mul(miss[k][w], miss[k][w]), importance));
    }
  }
}

/* Coordinate descent over the codes of values q: each goes where it costs least while the others stay. */
FN void NAME(descend)(const block *b, const int wide, int passes, const vf *s, const vf (*miss)[SIDE_BY_SIDE],
                      vf (*q)[SIDE_BY_SIDE]) {
  vf gradient[BLOCK][SIDE_BY_SIDE], inverse[SIDE_BY_SIDE];
  for (int w = 0; w < wide; w++) inverse[w] = f_div(f_all(1.0f), s[w]);
  for (int i = 0; i < BLOCK; i++) {
    for (int w = 0; w < wide; w++) gradient[i][w] = f_all(0.0f);
    for (int k = i; k < BLOCK; k++) {
      vf slope = f_all(b->metric->slope[i][k]);
      for (int w = 0; w < wide; w++) gradient[i][w] = f_add(gradient[i][w], f_mul(slope, miss[k][w]));
    }
  }
  for (int pass = 0; pass < passes; pass++)
    for (int i = 0; i < BLOCK; i++) {
      vf step = f_all(b->metric->step[i]), change[SIDE_BY_SIDE];
      for (int w = 0; w < wide; w++) {
        vf x = f_sub(q[i][w], f_mul(gradient[i][w], step));
        vf value = f_mul(s[w], NAME(e2m1_nearest)(f_mul(x, inverse[w])));
        change[w] = f_sub(value, q[i][w]);
        q[i][w] = value;
      }
      for (int k = 0; k < BLOCK; k++) {
        vf m = f_all(b->metric->metric[i][k]);
        for (int w = 0; w < wide; w++) gradient[k][w] = f_add(gradient[k][w], f_mul(change[w], m));
      }
    }
}

/* Take set w where it is the better one. */
FN void NAME(take)(rounded *to, vm where, vi scale, int w, const vf (*q)[SIDE_BY_SIDE],
                   const vf (*error)[SIDE_BY_SIDE], vf loss) {
  to->scale = i_pick(where, scale, to->scale);
  to->loss = f_pick(where, loss, to->loss);
  for (int k = 0; k < BLOCK; k++) {
    to->q[k] = f_pick(where, q[k][w], to->q[k]);
    to->error[k] = f_pick(where, error[k][w], to->error[k]);
  }
}

/* The codes of `wide` scales, descended from, and the best of these and, unless it is the first, of what is there. */
FN void NAME(finish)(const block *b, const int wide, int passes, int is_first, const vi *scale, rounded *best) {
  vf s[SIDE_BY_SIDE], q[BLOCK][SIDE_BY_SIDE], error[BLOCK][SIDE_BY_SIDE], miss[BLOCK][SIDE_BY_SIDE];
  vf new_q[BLOCK][SIDE_BY_SIDE], new_error[BLOCK][SIDE_BY_SIDE], loss[SIDE_BY_SIDE], new_loss[SIDE_BY_SIDE];
  s[0] = NAME(e4m3_value)(scale[0]);
  for (int w = 1; w < wide; w++) s[w] = NAME(e4m3_value)(scale[w]);
  NAME(settle)(b, wide, s, 0, q, error, miss, loss);
  if (passes) {
    for (int k = 0; k < BLOCK; k++)
      for (int w = 0; w < wide; w++) new_q[k][w] = q[k][w];
    NAME(descend)(b, wide, passes, s, miss, new_q);
    NAME(settle)(b, wide, s, 1, new_q, new_error, miss, new_loss);
  }
  for (int w = 0; w < wide; w++) {
    vm here = is_first && !w ? f_at_most(s[0], s[0]) : f_less(loss[w], best->loss);
    NAME(take)(best, here, scale[w], w, q, error, loss[w]);
    if (passes)
      NAME(take)(best, f_less(new_loss[w], best->loss), scale[w], w, new_q, new_error, new_loss[w]);
  }
}

APART void NAME(finish_one)(const block *b, int passes, int is_first, const vi *scale, rounded *best) {
  NAME(finish)(b, 1, passes, is_first, scale, best);
}

APART void NAME(finish_three)(const block *b, int passes, int is_first, const vi *scale, rounded *best) {
  NAME(finish)(b, 3, passes, is_first, scale, best);
}

/* Where every target is 0: codes 0 and the scale 1. */
FN void NAME(leave_dead)(const block *b, vf amax, rounded *best) {
  vm dead = f_at_most(amax, f_all(0.0f));
  if (!any(dead)) return;
  vf q[BLOCK][SIDE_BY_SIDE], error[BLOCK][SIDE_BY_SIDE], miss[BLOCK][SIDE_BY_SIDE], loss;
  for (int k = 0; k < BLOCK; k++) q[k][0] = f_all(0.0f);
  NAME(settle)(b, 1, NULL, 1, q, error, miss, &loss);
  NAME(take)(best, dead, i_all(ZERO_BLOCK), 0, q, error, loss);
}

/* The row that lane l works on: the last one once more where there are no more. */
FN int64_t NAME(row_of)(const round_job *j, int64_t from, int l) {
  return from + l < j->rows ? from + l : j->rows - 1;
}

/* What the rows had before stays where the new is not strictly better. */
FN void NAME(keep_current)(const round_job *j, const block *b, int64_t from, int64_t at, rounded *best) {
  vf q[BLOCK][SIDE_BY_SIDE], error[BLOCK][SIDE_BY_SIDE], miss[BLOCK][SIDE_BY_SIDE], loss;
  int32_t scales[LANES];
  float values[LANES];
  for (int l = 0; l < LANES; l++)
    scales[l] = j->current_scales[NAME(row_of)(j, from, l) * (j->columns / BLOCK) + at / BLOCK];
  vi scale = from_ints(scales);
  vf s = NAME(e4m3_value)(scale);
  for (int k = 0; k < BLOCK; k++) {
    for (int l = 0; l < LANES; l++)
      values[l] = e2m1_values[j->current_codes[NAME(row_of)(j, from, l) * j->columns + at + k]];
    q[k][0] = f_mul(f_load(values), s);
  }
  NAME(settle)(b, 1, NULL, 1, q, error, miss, &loss);
  NAME(take)(best, f_at_most(loss, best->loss), scale, 0, q, error, loss);
}

/* Sixteen columns of LANES rows as vectors, and back. */
FN void NAME(load_columns)(const round_job *j, const float *x, int64_t row, int64_t from, int64_t at, vf *out) {
#if NYB_AVX512
  for (int l = 0; l < 16; l++) out[l] = f_load(x + NAME(row_of)(j, from, l) * row + at);
  NAME(transpose)(out);
#else
  float columns[BLOCK][LANES];
  for (int l = 0; l < LANES; l++)
    for (int k = 0; k < BLOCK; k++) columns[k][l] = x[NAME(row_of)(j, from, l) * row + at + k];
  for (int k = 0; k < BLOCK; k++) out[k] = f_load(columns[k]);
#endif
}

FN void NAME(store_block)(const round_job *j, int64_t from, int64_t at, const rounded *r) {
  int64_t blocks = j->columns / BLOCK, some = j->rows - from < LANES ? j->rows - from : LANES;
  vf inverse = f_div(f_all(1.0f), NAME(e4m3_value)(r->scale));
  int32_t words[BLOCK / 4][LANES], scales[LANES], losses[LANES];
  i_store(scales, r->scale);
  i_store(losses, bits(r->loss));
  for (int w = 0; w < BLOCK / 4; w++) {
    vi word = i_all(0);
    for (int i = 3; i >= 0; i--)
      word = i_or(i_left(word, 8), NAME(e2m1_code)(NAME(e2m1_nearest)(f_mul(r->q[4 * w + i], inverse))));
    i_store(words[w], word);
  }
#if NYB_AVX512
  vf errors[BLOCK];
  for (int k = 0; k < BLOCK; k++) errors[k] = r->error[k];
  NAME(transpose)(errors);
#else
  int32_t errors[BLOCK][LANES];
  for (int k = 0; k < BLOCK; k++) i_store(errors[k], bits(r->error[k]));
#endif
  for (int64_t l = 0; l < some; l++) {
    int64_t row = from + l;
    uint8_t *codes = j->codes + row * j->columns + at;
    for (int w = 0; w < BLOCK / 4; w++) memcpy(codes + 4 * w, &words[w][l], 4);
    j->scales[row * blocks + at / BLOCK] = (uint8_t)scales[l];
    memcpy(j->loss + row * blocks + at / BLOCK, &losses[l], 4);
    float *error = j->error + row * j->columns + at;
#if NYB_AVX512
    memcpy(error, &errors[l], sizeof errors[l]);
#else
    for (int k = 0; k < BLOCK; k++) memcpy(error + k, &errors[k][l], 4);
#endif
  }
}

/* Later columns of the strip, less what the block's errors ask of them, one column of errors after the other. */
FN void NAME(compensate)(const round_job *j, int64_t at, const vf *error, vf *left) {
  for (int64_t k = at + BLOCK; k < j->columns; k += 8) {
    vf sum[8];
    for (int c = 0; c < 8; c++) sum[c] = left[k + c];
    for (int i = 0; i < BLOCK; i++) {
      const float *upper = j->upper + (at + i) * j->upper_row + k;
      for (int c = 0; c < 8; c++) sum[c] = f_sub(sum[c], f_mul(error[i], f_all(upper[c])));
    }
    for (int c = 0; c < 8; c++) left[k + c] = sum[c];
  }
}

FN void NAME(round_block)(const round_job *j, const block *b, rounded *best) {
  vf amax = f_abs(b->left[0]);
  for (int k = 1; k < BLOCK; k++) amax = f_max(amax, f_abs(b->left[k]));
  vi first = NAME(e4m3_nearest)(f_min(f_max(f_div(amax, f_all(6.0f)), f_all(0x1p-9f)), f_all(448.0f)));
  vi scale[MOST_KEPT];
  NAME(search)(b, first, j->lowest, j->highest, j->kept, scale);
  for (int w = 0; w < j->kept;) {
    if (j->kept - w < 3) NAME(finish_one)(b, j->passes, !w, scale + w, best), w += 1;
    else NAME(finish_three)(b, j->passes, !w, scale + w, best), w += 3;
  }
  NAME(leave_dead)(b, amax, best);
}

/* The strip of rows [from, from + LANES). */
KERNEL void NAME(round_rows)(const round_job *j, int64_t from) {
  vf left[MOST_COLUMNS], weight[BLOCK];
  for (int64_t at = 0; at < j->columns; at += BLOCK)
    NAME(load_columns)(j, j->target, j->target_row, from, at, left + at);
  for (int64_t at = 0; at < j->columns; at += BLOCK) {
    NAME(load_columns)(j, j->weight, j->weight_row, from, at, weight);
    block b = {left + at, weight, j->importance + at, &j->metrics[at / BLOCK]};
    rounded best;
    NAME(round_block)(j, &b, &best);
    if (j->current_codes) NAME(keep_current)(j, &b, from, at, &best);
    NAME(store_block)(j, from, at, &best);
    NAME(compensate)(j, at, best.error, left);
  }
}
#undef SIDE_BY_SIDE
