/* y = x W^T with weights as they lie in a file: what the driver (matmul.c) and the instruction sets (avx512.h, panel.h,
 * plain.h, blocks.h, blocks_plain.h) agree on.
 *
 * The order of the sums is the same for every number of rows and threads. An output has one vector of float sums: 16
 * lanes with AVX-512, 8 below. K runs in its natural order for FP8 and plain weights; for four-bit weights and float
 * operands each 64 elements are taken as their 32 even ones, then their 32 odd ones, because a byte holds two
 * neighbours. In that order a step is 32 elements of BF16, two per lane, in one dot product instruction, or as many
 * floats as there are lanes in one multiply-add (portable C rounds the product too, having no quick one). At the end
 * the lanes are added: halves, then quarters, then pairs. Then y = sum * scale + bias.
 * FP8 with a scale per 128 elements of K: with BF16 operands each 128 are summed from zero, and the sums go into the
 * output's with one multiply-add by their scale; with float operands the scale is multiplied into the weights.
 * Four-bit weights with BF16 or INT8 operands: each 16 are summed from zero, and so on; an output has 8 lanes with
 * AVX-512, 4 below, and block b of K goes into lane b modulo their number (blocks.h). INT8 sums of 16 are exact. */
#ifndef NYB_MATMUL_H
#define NYB_MATMUL_H
#include <stdint.h>

enum {
  NYB_WEIGHT_NVFP4 = 0,
  NYB_WEIGHT_MXFP4 = 1,
  NYB_WEIGHT_FP8 = 2,
  NYB_WEIGHT_FP8_CHANNEL = 3,
  NYB_WEIGHT_FP8_BLOCK = 4,
  NYB_WEIGHT_BF16 = 5,
  NYB_WEIGHT_F16 = 6,
  NYB_WEIGHT_F32 = 7,
};

/* One weight matrix and the columns of the output it fills. Pointers into files may be unaligned. */
typedef struct {
  const uint8_t *codes;
  const uint8_t *scale; /* per block or channel, bytes or floats; or NULL */
  const float *bias;    /* [rows], or NULL */
  int64_t rows;
  int64_t row_bytes;    /* from one row of codes to the next */
  int64_t column;       /* where its outputs begin in a row of y */
  float tensor_scale;   /* multiplies the result */
  int32_t format;
} nyb_segment;

/* What x is rounded to before it is multiplied. INT8: with a scale for each 16 elements of K, see pack_blocks.h. */
enum {
  NYB_PRECISION_F32 = 0,
  NYB_PRECISION_BF16 = 1,
  NYB_PRECISION_INT8 = 2, /* of four-bit weights; others take BF16 */
};

/* x [m, k] (rows x_stride elements apart, float or BF16), sorted by group: the next counts[g] rows go through segments
 * [first[g], first[g + 1]); counts NULL: all m rows go through the one group. y is float [m, n]. Returns 0, or 1
 * without memory. */
int nyb_matmul(const nyb_segment *segments, const int64_t *first, const int64_t *counts, int64_t groups, const void *x,
               int64_t x_stride, int x_is_bf16, int64_t m, int64_t k, float *y, int64_t n, int precision, int isa,
               int threads);

enum {
  TILE_ROWS = 6,            /* weight rows that are decoded together, at most */
  TILE_BYTES = 4096,        /* of one decoded row: with the rows of x that meet it, it stays in the first cache */
  TILE_STRIDE = TILE_BYTES + 64, /* rows that lie 4096 bytes apart would meet in one set of the cache */
  CACHE_BYTES = 1 << 19,    /* of x in a block: half of the second cache */
  BLOCK_ROWS = 128,         /* rows of x in a block, where sums wait between pieces of K */
  WINDOWS = 4,              /* sets of weight rows that go through K together, with a block of rows of x */
  SCALE_BLOCK = 128,        /* of FP8_BLOCK, along N and K */
  FEW = 4,                  /* rows of x up to which weights are decoded in registers, without a tile */
  AHEAD = 2048,             /* bytes of a row that are asked of memory before they are needed */
  BF16_CHUNK = 128,         /* bytes of 64 elements of x, packed for blocks */
  INT8_CHUNK = 96,
};

/* A tile of decoded weight rows times rows of x. */
typedef struct {
  const char *tile;             /* [TILE_ROWS][TILE_STRIDE] */
  const char *x;                /* [rows], x_stride bytes apart */
  int64_t x_stride, rows, bytes; /* bytes of this piece of K in a row, a multiple of 64 */
  float *sums;                  /* [rows][TILE_ROWS][16], carried between pieces of K */
  int is_first, is_last;
  const float (*block_scales)[8]; /* per 128 elements of K and weight row; NULL but for FP8_BLOCK with BF16 operands */
  float scale[8], bias[8];      /* per weight row */
  int valid;                    /* weight rows that exist */
  float *y;                     /* at this tile's first column */
  int64_t n;
} product;

/* Weight rows [row, end) times rows of packed x. */
typedef struct {
  const nyb_segment *segment;
  int64_t row, end, k;
  const char *x;
  int64_t x_stride, rows;
  float *y; /* at the first row of x and the segment's first column */
  int64_t n;
} task;

/* How x is packed: in natural order; each 64 elements into even and odd ones; or as pack_blocks.h says. */
enum { X_FLOAT, X_FLOAT_SPLIT, X_BF16, X_BF16_BLOCKS, X_INT8_BLOCKS, X_KINDS };

/* How an instruction set multiplies, with operands of one type. */
typedef struct {
  int kind; /* of x; X_FLOAT stands for both */
  int tile_rows;
  int chunk, chunk_bytes;      /* elements of x that are packed together, and the bytes they take */
  double decode_cost, x_cost;  /* rough cycles of an element of weight, and of one times a row of x */
  /* A row of x into the operands' type, zeros up to whole chunks. */
  void (*pack)(const void *x, int x_is_bf16, int64_t k, int rounded, int is_split, void *out);
  /* Of blocks: all of a task. The others are NULL then. */
  void (*run)(const task *t);
  /* One row's elements [from, to) of K, in the order of the sums, zeros up to a multiple of 64 elements. */
  void (*decode)(const nyb_segment *s, int64_t row, int64_t from, int64_t to, int64_t k, void *out);
  void (*multiply)(const product *p);
  void (*few)(const task *t); /* at most FEW rows of x; NULL: there is none */
} engine;

#endif
