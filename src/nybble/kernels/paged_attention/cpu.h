/* What Python calls. Every pointer is plain memory; nothing is kept after a call returns. Python has checked that
 * every position that is read or written has a page. */
#ifndef NYB_PAGED_ATTENTION_H
#define NYB_PAGED_ATTENTION_H
#include <stdint.h>

#include "../isa.h"

/* The pages of one layer, and which of them hold the sequences of a batch. */
typedef struct {
  char *keys, *values;    /* [pages, kv_heads, page_tokens, head_dim] */
  const int32_t *table;   /* [sequences, width] */
  const int32_t *starts;  /* [sequences + 1] */
  const int32_t *lengths; /* [sequences] */
  int64_t sequences, width, kv_heads, page_tokens, head_dim;
  int64_t is_bf16; /* pages are BF16, else float32 */
} nyb_pages;

void nyb_paged_write(const nyb_pages *pages, const float *k, const float *v, int isa);
/* window 0: every position up to the query's own */
void nyb_paged_attention(const nyb_pages *pages, const float *q, float *out, int64_t query_heads, float scale,
                         int64_t window, int isa, int threads);

#endif
