/* What Python calls. Every pointer is plain memory; nothing is kept after a call returns. */
#ifndef NYB_BLOCK_QUANTIZE_H
#define NYB_BLOCK_QUANTIZE_H
#include <stdint.h>

#include "../isa.h"

enum { NYB_BF16 = 0, NYB_F16 = 1, NYB_F32 = 2 };             /* source dtypes */
enum { NYB_ABSMAX = 0, NYB_FOUR_SIX = 1, NYB_MSE = 2 };      /* scale searches */
enum { NYB_NVFP4 = 0, NYB_MXFP4 = 1, NYB_FP8 = 2 };          /* formats */

/* A contiguous run of a weight: `count` elements (a multiple of the block for four-bit formats). */
typedef struct {
  const char *source;
  uint8_t *codes;
  uint8_t *scale;     /* one byte per block; unused for FP8 */
  int64_t count;
  float tensor_scale; /* NVFP4: the tensor scale; FP8: the scale of this run; MXFP4: unused */
  int32_t bf16_quotient; /* FP8: round x / scale to BF16 before the cast, as ModelOpt does */
} nyb_segment;

/* Result of nyb_compare, per segment. */
typedef struct {
  double error;       /* sum of (source - decoded)^2 */
  double energy;      /* sum of source^2 */
  int64_t bad_scales; /* scale bytes that are zero, negative or NaN */
} nyb_comparison;

void nyb_amax(const nyb_segment *segments, int64_t n, int dtype, uint32_t *amax_bits, int isa, int threads);
void nyb_quantize(const nyb_segment *segments, int64_t n, int dtype, int format, int search, int isa, int threads);
void nyb_decode(const nyb_segment *segments, int64_t n, int format, float *const *out, int isa, int threads);
void nyb_compare(const nyb_segment *segments, int64_t n, int dtype, int format, nyb_comparison *out, int isa,
                 int threads);

#endif
