/* Block quantization in lanes: lane b of a vector belongs to block b, the elements of a block follow one another in
 * time. So a block's error is a sum in the order of its elements, and 16 (or 8) blocks are searched at once.
 * Included once per instruction set, after lanes.h. Definition and tests: formats/search.py. */
#include "lanes.h"

/* E2M1 rounding of t >= 0 (nearest, ties to even, saturating at 6). Values below 2 lie on a grid of 1/2, below 4 of 1,
 * above of 2: adding 1.5 * 2^23 grid steps rounds to the grid, and leaves the count of steps in the low bits. */
#define E2M1_CODE(t, code, value)                                                                            \
  vf t_ = f_min(t, f_all(6.0f));                                                                             \
  vi e_ = i_max(i_and(bits(t_), i_all(0x7f800000)), i_all(0x3f800000)); /* 2^floor(log2 t), at least 1 */    \
  vf m_ = from_bits(i_add(e_, i_all((22 << 23) | 0x00400000)));         /* 1.5 * 2^23 steps */               \
  vf r_ = f_add(t_, m_);                                                                                     \
  vf value = f_sub(r_, m_);                                                                                  \
  vi code = i_add(i_and(bits(r_), i_all(7)), i_right(i_sub(e_, i_all(0x3f800000)), 22));

/* The float value of E4M3 codes 1..126. */
FN vf NAME(e4m3_value)(vi code) {
  vf normal = from_bits(i_add(i_left(code, 20), i_all(120 << 23)));
  vf subnormal = f_mul(to_float(code), f_all(0x1p-9f));
  return f_pick(i_less(code, i_all(8)), subnormal, normal);
}

/* The smallest E4M3 code (1..126) whose value is at least r > 0; 126 if none is. */
FN vi NAME(e4m3_ceil)(vf r) {
  vi normal = i_sub(i_right(i_add(bits(r), i_all(0xfffff)), 20), i_all(120 << 3));
  vf steps = f_mul(r, f_all(512.0f));
  vi whole = to_int(f_min(steps, f_all(1024.0f)));
  vi subnormal = i_pick(f_less(to_float(whole), steps), i_add(whole, i_all(1)), whole);
  vi code = i_pick(f_less(r, f_all(0x1p-6f)), subnormal, normal);
  return i_max(i_min(code, i_all(126)), i_all(1));
}

/* The E4M3 code nearest to r >= 2^-9, ties to even; r <= 448. */
FN vi NAME(e4m3_nearest)(vf r) {
  vi b = bits(r);
  vi odd = i_and(i_right(b, 20), i_all(1));
  vi normal = i_sub(i_right(i_add(b, i_add(i_all(0x7ffff), odd)), 20), i_all(120 << 3));
  vf steps = f_add(f_mul(f_min(r, f_all(1.0f)), f_all(512.0f)), f_all(0x1.8p23f));
  vi subnormal = i_and(bits(steps), i_all(0x3ff));
  return i_pick(f_less(r, f_all(0x1p-6f)), subnormal, normal);
}

/* Sum over a block of (x - s * round_e2m1(x / s))^2 in float32, element by element, for x >= 0.
 *
 * `few_bits`: the input has at most 11 significant bits and s at most 4 (times a power of two), so the quotient taken
 * through the reciprocal cannot fall on the wrong side of a threshold, and a look-up of floor(4 t) finds a nearest
 * code; at a tie both cost the same. `clips`: some x may lie above 7.5 s. */
FN void NAME(block_errors)(const vf *x, int block, const vf *s, int candidates, int few_bits, int clips, vf *error) {
  vf inverse[4], sum[4];
  for (int c = 0; c < candidates; c++) sum[c] = f_all(0.0f);
#if NYB_AVX512
  if (few_bits) {
    const __m512 low = _mm512_setr_ps(0, .5f, .5f, 1, 1, 1.5f, 1.5f, 2, 2, 2, 3, 3, 3, 3, 4, 4);
    const __m512 high = _mm512_setr_ps(4, 4, 4, 4, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 0); /* 31: 4t - 1/2 < 0 */
    vf most[4];
    for (int c = 0; c < candidates; c++) inverse[c] = f_div(f_all(4.0f), s[c]), most[c] = f_mul(s[c], f_all(7.5f));
    _Pragma("GCC unroll 2") for (int i = 0; i < block; i++) /* unrolled further, compilers spill */
      _Pragma("GCC unroll 4") for (int c = 0; c < candidates; c++) {
        vf t = clips ? f_min(x[i], most[c]) : x[i];
        /* 2^23 - 1/2 + 4t rounds to an integer whose low five bits are the index. */
        __m512i index = _mm512_castps_si512(_mm512_fmadd_ps(t, inverse[c], f_all(8388607.5f)));
        vf d = f_fnma(s[c], _mm512_permutex2var_ps(low, index, high), x[i]);
        sum[c] = f_add(sum[c], f_mul(d, d));
      }
    for (int c = 0; c < candidates; c++) error[c] = sum[c];
    return;
  }
#endif
  (void)few_bits, (void)clips;
  for (int c = 0; c < candidates; c++) inverse[c] = f_div(f_all(1.0f), s[c]);
  for (int i = 0; i < block; i++)
    for (int c = 0; c < candidates; c++) {
      E2M1_CODE(f_mul(x[i], inverse[c]), code, value);
      (void)code;
      vf d = f_fnma(s[c], value, x[i]);
      sum[c] = f_add(sum[c], f_mul(d, d));
    }
  for (int c = 0; c < candidates; c++) error[c] = sum[c];
}

FN vf NAME(block_error)(const vf *x, int block, vf s, int few_bits) {
  vf error;
  NAME(block_errors)(x, block, &s, 1, few_bits, 1, &error);
  return error;
}

/* The E4M3 code of the block scale with the least error, the smaller one at a tie; x is in units of the tensor scale
 * (a power of two, so that this is exact), which keeps the squares clear of overflow and underflow. No code is left
 * out that could win:
 * - Let s0 be the smallest scale with 6 s0 >= amax. For s >= 2 s0 the scale s / 2 is at least as good: up to
 *   6 * (s / 2) its grid holds every point of the grid of s, and no element lies above. So the code of s0 plus 8, and
 *   all after it, lose. Halving needs a normal number, hence 15 at least.
 * - Below s0 the largest element alone costs (amax - 6 s)^2; that grows, and ends the descent.
 * Several candidates are tried at once: independent sums hide the latency of an addition. */
FN vi NAME(search_mse)(const vf *x, vf amax, int few_bits) {
  vf sixth = f_div(amax, f_all(6.0f)), best = f_all(__builtin_inff()), s[4], e[4];

  /* Normal scales are the floats with four significant bits: the next code is the next one. */
  vi at = i_and(i_add(bits(sixth), i_all(0xfffff)), i_all(~0xfffff)); /* the smallest not below */
  vm short_of = f_less(f_mul(from_bits(at), f_all(6.0f)), amax); /* the division rounded down */
  at = i_pick(short_of, i_add(at, i_all(1 << 20)), at);
  const vi least = i_all((16 << 20) + (120 << 23)), most = i_all((119 << 20) + (120 << 23));
  if (!any(i_less(at, least)) && !any(i_less(most, at))) { /* codes 16 to 119: an octave both ways is normal too */
    vi best_at = at;
    for (int up = 0; up < 8; up += 4) {
      for (int c = 0; c < 4; c++) s[c] = from_bits(i_add(at, i_all((up + c) << 20)));
      NAME(block_errors)(x, 16, s, 4, few_bits, 0, e);
      for (int c = 0; c < 4; c++) {
        best_at = i_pick(f_less(e[c], best), bits(s[c]), best_at);
        best = f_min(best, e[c]);
      }
    }
    for (int down = 1; down <= 8; down += 2) {
      vf over = f_sub(amax, f_mul(from_bits(i_sub(at, i_all(down << 20))), f_all(6.0f)));
      if (!any(f_at_most(f_mul(over, over), best))) return i_sub(i_right(best_at, 20), i_all(120 << 3));
      for (int c = 0; c < 2; c++) s[c] = from_bits(i_sub(at, i_all((down + c) << 20)));
      NAME(block_errors)(x, 16, s, 2, few_bits, 1, e);
      for (int c = 0; c < 2; c++) {
        best_at = i_pick(f_at_most(e[c], best), bits(s[c]), best_at);
        best = f_min(best, e[c]);
      }
    }
    best = f_all(__builtin_inff()); /* a descent of a whole octave: adversarial blocks only */
  }

  vi first = NAME(e4m3_ceil)(sixth);
  short_of = f_less(f_mul(NAME(e4m3_value)(first), f_all(6.0f)), amax);
  first = i_min(i_pick(short_of, i_add(first, i_all(1)), first), i_all(126));
  vi last = i_min(i_max(i_add(first, i_all(7)), i_all(15)), i_all(126));
  vi best_code = first;
  for (vi code = i_sub(first, i_all(1)); any(i_less(code, last));) {
    code = i_min(i_add(code, i_all(1)), last);
    vf error = NAME(block_error)(x, 16, NAME(e4m3_value)(code), few_bits);
    best_code = i_pick(f_less(error, best), code, best_code);
    best = f_min(best, error);
  }
  for (vi code = first;;) {
    code = i_max(i_sub(code, i_all(1)), i_all(1));
    vf scale = NAME(e4m3_value)(code);
    vf over = f_sub(amax, f_mul(scale, f_all(6.0f)));
    vf error = NAME(block_error)(x, 16, scale, few_bits);
    best_code = i_pick(f_at_most(error, best), code, best_code);
    best = f_min(best, error);
    vf cost = f_pick(i_less(i_all(1), code), f_mul(over, over), f_all(__builtin_inff()));
    if (!any(f_at_most(cost, best))) return best_code;
  }
}

/* Four-over-six: the scale that maps the largest element to 6, or to 4 where that costs less (at a tie: 6). */
FN vi NAME(search_four_six)(const vf *x, vf amax, int few_bits) {
  vf smallest = f_all(0x1p-9f), largest = f_all(448.0f);
  vi six = NAME(e4m3_nearest)(f_min(f_max(f_div(amax, f_all(6.0f)), smallest), largest));
  vi four = NAME(e4m3_nearest)(f_min(f_max(f_div(amax, f_all(4.0f)), smallest), largest));
  vf e6 = NAME(block_error)(x, 16, NAME(e4m3_value)(six), few_bits);
  vf e4 = NAME(block_error)(x, 16, NAME(e4m3_value)(four), few_bits);
  return i_pick(f_less(e4, e6), four, six);
}

/* ModelOpt's rule: amax / (6 g), clamped to [2^-9, 448], rounded to nearest; a zero becomes 1. */
FN vi NAME(scale_absmax)(vf amax, vf g) {
  vf r = f_div(amax, f_mul(f_all(6.0f), g));
  vi code = NAME(e4m3_nearest)(f_min(f_max(r, f_all(0x1p-9f)), f_all(448.0f)));
  return i_pick(f_at_most(r, f_all(0.0f)), i_all(0x38), code);
}

/* The E8M0 exponent field (1..252) of an MXFP4 block.
 * absmax: floor(log2(amax rounded up to a power of two where its mantissa is 1.75 or more)) - 2, as both tools write.
 * mse: the best of all: from the first exponent whose grid reaches amax (a larger one is never better, as in
 * search_mse) downwards until the largest element alone costs more. Errors are in units of that first scale. */
FN vi NAME(scale_mx)(const vf *x, vf amax, int search) {
  vi rounded = i_right(i_add(bits(amax), i_all(0x00200000)), 23);
  vi field = i_min(i_max(i_sub(rounded, i_all(2)), i_all(1)), i_all(NYB_MX_MAX));
  if (search == NYB_ABSMAX) return field;
  vi top = i_min(i_add(field, i_all(1)), i_all(NYB_MX_MAX));
  vf unit = from_bits(i_left(i_sub(i_all(254), top), 23)); /* 1 / scale of `top` */
  vf y[32];
  for (int i = 0; i < 32; i++) y[i] = f_mul(x[i], unit);
  vf most = f_mul(amax, unit);
  vi best_code = top;
  vf best = NAME(block_error)(y, 32, f_all(1.0f), 0);
  for (vi code = top;;) {
    code = i_max(i_sub(code, i_all(1)), i_all(1));
    vf s = from_bits(i_left(i_add(i_sub(code, top), i_all(127)), 23));
    vf over = f_max(f_sub(most, f_mul(s, f_all(6.0f))), f_all(0.0f));
    vf cost = f_pick(i_less(i_all(1), code), f_mul(over, over), f_all(__builtin_inff()));
    vm repeat = f_at_most(cost, best);
    vf e = NAME(block_error)(y, 32, s, 0);
    vm better = f_at_most(e, best);
    best = f_pick(better, e, best);
    best_code = i_pick(better, code, best_code);
    if (!any(repeat)) return best_code;
  }
}

/* The E2M1 codes of the quotients x / s >= 0, to nearest, ties to even. */
FN vi NAME(e2m1_codes)(vf x, vf s, int few_bits) {
#if NYB_AVX512
  if (few_bits) {
    /* Quotients that are not ties stay 2^-11 clear of every threshold (see block_errors), so nudged down and up by
     * 2^-13 they look up the same code; ties look up both neighbours, and the even one has the bits they share. */
    const __m512i low = _mm512_setr_epi32(0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 6, 6);
    const __m512i high = _mm512_setr_epi32(6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 0);
    vf inverse = f_div(f_all(4.0f), s), t = f_min(x, f_mul(s, f_all(7.5f))), half = f_all(8388607.5f);
    vf below = _mm512_fmadd_ps(t, f_mul(inverse, f_all(1 - 0x1p-13f)), half);
    vf above = _mm512_fmadd_ps(t, f_mul(inverse, f_all(1 + 0x1p-13f)), half);
    vi down = _mm512_permutex2var_epi32(low, bits(below), high), up = _mm512_permutex2var_epi32(low, bits(above), high);
    return i_and(up, i_or(down, i_all(~1)));
  }
#endif
  (void)few_bits;
  E2M1_CODE(f_div(x, s), code, value);
  (void)value;
  return code;
}

/* Transpose LANES blocks into lanes: x[i] holds element i of each block. */
FN void NAME(load_blocks)(const void *source, int dtype, int block, vf *x) {
#if NYB_AVX512
  if (dtype == NYB_BF16 && block == 16) {
    /* Pairs of elements are dwords: an [16 blocks, 8 dwords] transpose in three rounds of two-source permutes. */
    const __m512i first = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(4));
    const __m512i low4 = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high4 = _mm512_add_epi32(low4, _mm512_set1_epi32(8));
    const __m512i low8 = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const __m512i high8 = _mm512_add_epi32(low8, _mm512_set1_epi32(8));
    __m512i a[8], b[8];
    for (int r = 0; r < 4; r++) { /* four blocks: dwords 0..3 and 4..7 */
      __m512i p = _mm512_loadu_si512((const char *)source + 128 * r);
      __m512i q = _mm512_loadu_si512((const char *)source + 128 * r + 64);
      a[r] = _mm512_permutex2var_epi32(p, first, q);
      a[r + 4] = _mm512_permutex2var_epi32(p, second, q);
    }
    for (int h = 0; h < 2; h++) /* eight blocks, two dwords */
      for (int r = 0; r < 2; r++) {
        b[4 * h + r] = _mm512_permutex2var_epi32(a[4 * h + 2 * r], low4, a[4 * h + 2 * r + 1]);
        b[4 * h + 2 + r] = _mm512_permutex2var_epi32(a[4 * h + 2 * r], high4, a[4 * h + 2 * r + 1]);
      }
    for (int j = 0; j < 4; j++) { /* sixteen blocks, one dword */
      __m512i even = _mm512_permutex2var_epi32(b[2 * j], low8, b[2 * j + 1]);
      __m512i odd = _mm512_permutex2var_epi32(b[2 * j], high8, b[2 * j + 1]);
      x[4 * j] = from_bits(i_left(even, 16));
      x[4 * j + 1] = from_bits(i_and(even, i_all((int32_t)0xffff0000)));
      x[4 * j + 2] = from_bits(i_left(odd, 16));
      x[4 * j + 3] = from_bits(i_and(odd, i_all((int32_t)0xffff0000)));
    }
    return;
  }
#endif
  int32_t lane[LANES];
  if (dtype == NYB_BF16) {
    for (int l = 0; l < LANES; l++) lane[l] = l * (block / 2);
    vi at = from_ints(lane);
    for (int i = 0; i < block / 2; i++) {
      vi pair = bits(gather((const float *)source + i, at));
      x[2 * i] = from_bits(i_left(pair, 16));
      x[2 * i + 1] = from_bits(i_and(pair, i_all((int32_t)0xffff0000)));
    }
    return;
  }
  float wide[LANES * 32];
  if (dtype == NYB_F16) {
    for (int i = 0; i < LANES * block; i++) wide[i] = f16_to_float((const uint16_t *)source + i);
    source = wide;
  }
  for (int l = 0; l < LANES; l++) lane[l] = l * block;
  vi at = from_ints(lane);
  for (int i = 0; i < block; i++) x[i] = gather((const float *)source + i, at);
}

/* The largest magnitude whose quotient by s rounds to zero, which is s * 2^-150 rounded down: ModelOpt, and so the
 * definition, takes the sign of the quotient, not of the weight. Arithmetic on subnormals is slow: avoided where it
 * is not needed, which is almost everywhere. */
FN vf NAME(vanishing)(vf s) {
  if (!any(f_at_most(f_all(2.0f), s))) return f_all(0.0f);
  vf steps = f_min(f_mul(s, f_all(0.5f)), f_all(0x1p23f)); /* of 2^-149 */
  return f_pick(f_less(s, f_all(0x1p24f)), from_bits(to_int(steps)), f_mul(f_mul(s, f_all(0x1p-75f)), f_all(0x1p-75f)));
}

/* Quantize LANES blocks: codes (block / 2 bytes each) and one scale byte each. */
FN void NAME(quantize_blocks)(const void *source, int dtype, int block, int search, float tensor_scale,
                              uint8_t *codes, uint8_t *scale) {
  vf x[32], magnitude[32];
  NAME(load_blocks)(source, dtype, block, x);
  int in_units = block == 16 && search != NYB_ABSMAX; /* of the tensor scale, a power of two */
  vf unit = f_div(f_all(1.0f), f_all(in_units ? tensor_scale : 1.0f));
  for (int i = 0; i < block; i++) magnitude[i] = f_mul(f_abs(x[i]), unit);
  vf amax = magnitude[0];
  for (int i = 1; i < block; i++) amax = f_max(amax, magnitude[i]);

  int few_bits = dtype != NYB_F32;
  vi code;
  if (block == 32) code = NAME(scale_mx)(magnitude, amax, search);
  else if (search == NYB_MSE) code = NAME(search_mse)(magnitude, amax, few_bits);
  else if (search == NYB_FOUR_SIX) code = NAME(search_four_six)(magnitude, amax, few_bits);
  else code = NAME(scale_absmax)(amax, f_all(tensor_scale));
  code = i_pick(f_at_most(amax, f_all(0.0f)), i_all(block == 32 ? NYB_MX_ZERO : 0x38), code); /* zero block: scale 1 */
  vf s = block == 32 ? from_bits(i_left(code, 23)) : NAME(e4m3_value)(code);
  if (block == 16 && !in_units) s = f_mul(s, f_all(tensor_scale));

  vf negative = f_all(0.0f); /* the least value without a sign: -0 has none, and what vanishes; scales reach 448 g */
  if (block == 32 || tensor_scale >= 0x1p-8f)
    negative = f_sub(negative, NAME(vanishing)(in_units ? f_mul(s, f_all(tensor_scale)) : s));
  vi words[4];
  for (int w = 0; w < block / 8; w++) {
    vi word = i_all(0);
    for (int i = 7; i >= 0; i--) {
      vi e2m1 = NAME(e2m1_codes)(magnitude[8 * w + i], s, few_bits && in_units);
      word = i_or(i_left(word, 4), i_or_where(f_less(x[8 * w + i], negative), e2m1, i_all(8)));
    }
    words[w] = word;
  }
#if NYB_AVX512
  _mm_storeu_si128((__m128i *)scale, _mm512_cvtepi32_epi8(code));
  if (block == 16) { /* two words per block: interleave them */
    const __m512i zip = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    _mm512_storeu_si512(codes, _mm512_permutex2var_epi32(words[0], zip, words[1]));
    _mm512_storeu_si512(codes + 64, _mm512_permutex2var_epi32(words[0], i_add(zip, i_all(8)), words[1]));
    return;
  }
#endif
  int32_t lanes[LANES];
  i_store(lanes, code);
  for (int l = 0; l < LANES; l++) scale[l] = (uint8_t)lanes[l];
  for (int w = 0; w < block / 8; w++) {
    i_store(lanes, words[w]);
    for (int l = 0; l < LANES; l++) memcpy(codes + (l * (block / 8) + w) * 4, &lanes[l], 4);
  }
}

FN void NAME(quantize_run)(const nyb_segment *segment, int64_t from, int64_t to, int dtype, int block, int search) {
  const int width = dtype == NYB_F32 ? 4 : 2;
  for (int64_t b = from; b < to; b += LANES) {
    const char *source = segment->source + b * block * width;
    uint8_t *codes = segment->codes + b * (block / 2), *scale = segment->scale + b;
    if (to - b >= LANES) {
      NAME(quantize_blocks)(source, dtype, block, search, segment->tensor_scale, codes, scale);
      continue;
    }
    char padded[LANES * 32 * 4] = {0};
    uint8_t some_codes[LANES * 16], some_scales[LANES];
    memcpy(padded, source, (size_t)(to - b) * block * width);
    NAME(quantize_blocks)(padded, dtype, block, search, segment->tensor_scale, some_codes, some_scales);
    memcpy(codes, some_codes, (size_t)(to - b) * (block / 2));
    memcpy(scale, some_scales, (size_t)(to - b));
  }
}

/* One specialised copy per search and input width: constants propagate into the inlined functions above. */
KERNEL void NAME(quantize_range)(const nyb_segment *segment, int64_t from, int64_t to, int dtype, int block,
                                 int search) {
  const int bf16 = dtype == NYB_BF16;
  if (block == 32) NAME(quantize_run)(segment, from, to, dtype, 32, search);
  else if (bf16 && search == NYB_MSE) NAME(quantize_run)(segment, from, to, NYB_BF16, 16, NYB_MSE);
  else if (bf16 && search == NYB_FOUR_SIX) NAME(quantize_run)(segment, from, to, NYB_BF16, 16, NYB_FOUR_SIX);
  else if (bf16) NAME(quantize_run)(segment, from, to, NYB_BF16, 16, NYB_ABSMAX);
  else NAME(quantize_run)(segment, from, to, dtype, 16, search);
}

/* FP8: one scale for the whole segment, element by element in lanes. */
KERNEL void NAME(encode_fp8)(const nyb_segment *segment, int64_t from, int64_t to, int dtype) {
  vf s = f_all(segment->tensor_scale);
  for (int64_t i = from; i < to; i += LANES) {
    int n = to - i < LANES ? (int)(to - i) : LANES;
    float x[LANES] = {0};
    int32_t codes[LANES];
    widen(segment->source, i, n, dtype, x);
    vf value = f_load(x);
    vf t = f_div(f_abs(value), s);
    if (segment->bf16_quotient) {
      vi odd = i_and(i_right(bits(t), 16), i_all(1));
      t = from_bits(i_and(i_add(bits(t), i_add(odd, i_all(0x7fff))), i_all((int32_t)0xffff0000)));
    }
    t = f_min(t, f_all(448.0f));
    vi sign = i_and(i_right(bits(value), 24), i_all(0x80));
    i_store(codes, i_or(NAME(e4m3_nearest)(t), sign));
    for (int l = 0; l < n; l++) segment->codes[i + l] = (uint8_t)codes[l];
  }
}

#include "decode.h"
