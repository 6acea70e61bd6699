/* One row of logits, or a pair of them, in blocks of BLOCK entries: the largest entry first, then the exponentials
 * against the largest so far, so that every entry comes from memory once. The order of the sums is fixed. */
#include "lanes.h"

/* Takes in a block: its largest entry, and what the sums so far are to be multiplied by. */
FN double NAME(meet)(seen *s, const float *block, int64_t at) {
  float best = NAME(largest)(block, BLOCK, s->best);
  if (!(best > s->best)) return 1;
  double before = s->peak;
  s->best = best;
  s->best_block = at;
  s->peak = best;
  return exp(before - s->peak);
}

KERNEL void NAME(one_row)(const float *row, int64_t n, seen *out) {
  float tail[BLOCK];
  seen s = nothing_seen;
  for (int64_t at = 0; at < n; at += BLOCK) {
    const float *block = whole_block(row, at, n, tail);
    s.sum *= NAME(meet)(&s, block, at);
    const vd peak = NAME(all)(s.peak);
    vd a = NAME(all)(0), b = a, c = a, d = a;
    for (int i = 0; i < BLOCK; i += 4 * LANES) {
      a = NAME(add)(a, NAME(exponential)(NAME(sub)(NAME(widen)(block + i), peak)));
      b = NAME(add)(b, NAME(exponential)(NAME(sub)(NAME(widen)(block + i + LANES), peak)));
      c = NAME(add)(c, NAME(exponential)(NAME(sub)(NAME(widen)(block + i + 2 * LANES), peak)));
      d = NAME(add)(d, NAME(exponential)(NAME(sub)(NAME(widen)(block + i + 3 * LANES), peak)));
    }
    s.sum += NAME(total)(a, b, c, d);
  }
  *out = s;
}

/* Also the sum of e^(r - peak) (r - c): the sums of the two rows are made exactly as one_row makes them. */
KERNEL double NAME(two_rows)(const float *reference, const float *candidate, int64_t n, seen *ours, seen *theirs) {
  float tails[2][BLOCK];
  seen r = nothing_seen, c = nothing_seen;
  double apart = 0;
  const vd least = NAME(all)(-700.0);
  for (int64_t at = 0; at < n; at += BLOCK) {
    const float *x = whole_block(reference, at, n, tails[0]), *y = whole_block(candidate, at, n, tails[1]);
    double factor = NAME(meet)(&r, x, at);
    r.sum *= factor;
    apart *= factor;
    c.sum *= NAME(meet)(&c, y, at);
    const vd x_peak = NAME(all)(r.peak), y_peak = NAME(all)(c.peak);
    vd p[4], q[4], w[4];
    for (int k = 0; k < 4; k++) p[k] = q[k] = w[k] = NAME(all)(0);
    for (int i = 0; i < BLOCK; i += 4 * LANES) {
      for (int k = 0; k < 4; k++) {
        vd a = NAME(widen)(x + i + k * LANES), b = NAME(widen)(y + i + k * LANES);
        vd above = NAME(sub)(a, x_peak), e = NAME(exponential)(above);
        /* -infinity - -infinity is NaN, but an entry without probability adds nothing. */
        vd difference = NAME(keep)(NAME(not_less)(above, least), NAME(sub)(a, b));
        p[k] = NAME(add)(p[k], e);
        q[k] = NAME(add)(q[k], NAME(exponential)(NAME(sub)(b, y_peak)));
        w[k] = NAME(fma)(e, difference, w[k]);
      }
    }
    r.sum += NAME(total)(p[0], p[1], p[2], p[3]);
    c.sum += NAME(total)(q[0], q[1], q[2], q[3]);
    apart += NAME(total)(w[0], w[1], w[2], w[3]);
  }
  *ours = r;
  *theirs = c;
  return apart;
}

/* The first of the largest entries, NaN passed over; 0 where all are NaN. */
KERNEL int64_t NAME(likeliest)(const float *row, int64_t n) {
  float tail[BLOCK], best = -INFINITY;
  int64_t from = 0; /* nothing before is as large */
  for (int64_t at = 0; at < n; at += BLOCK) {
    float top = NAME(largest)(whole_block(row, at, n, tail), BLOCK, best);
    if (!(top > best)) continue;
    best = top;
    from = at;
  }
  for (int64_t i = from; i < n; i++) {
    if (row[i] == best) return i;
  }
  return 0;
}
