/* What Python calls. Every pointer is plain memory; nothing is kept after a call returns. Whoever calls has checked
 * that every position that is read or written has a page. */
#ifndef NYB_PAGED_ATTENTION_H
#define NYB_PAGED_ATTENTION_H
#include <stdint.h>

#include "../isa.h"

/* What pages hold; Python passes these numbers. */
enum { NYB_PAGES_F32 = 0, NYB_PAGES_BF16 = 1, NYB_PAGES_E4M3 = 2 };

/* `keys` and `values` are [pages, kv_heads, page_tokens, head_dim] of a format; `table` [sequences, width], `starts`
 * [sequences + 1], `lengths` [sequences]; there are starts[sequences] tokens. k, v and q are [tokens, heads, head_dim]
 * with strides in floats, out is contiguous. E4M3 pages hold value / scale. */

/* `clipped`, which may be NULL, counts the numbers beyond 448 scales. */
void nyb_paged_write(char *keys, char *values, const int32_t *table, const int32_t *starts, const int32_t *lengths,
                     int64_t sequences, int64_t width, int64_t kv_heads, int64_t page_tokens, int64_t head_dim,
                     int format, float key_scale, float value_scale, int64_t *clipped, const float *k, int64_t k_token,
                     int64_t k_head, const float *v, int64_t v_token, int64_t v_head, int isa, int threads);

/* `scale` is that of the softmax; window 0: every position up to the query's own; those before `first` are seen by
 * nobody but themselves. Returns 0, or 1 without memory. */
int nyb_paged_attention(const char *keys, const char *values, const int32_t *table, const int32_t *starts,
                        const int32_t *lengths, int64_t sequences, int64_t width, int64_t kv_heads,
                        int64_t page_tokens, int64_t head_dim, int format, float key_scale, float value_scale,
                        const float *q, int64_t q_token, int64_t q_head, float *out, int64_t query_heads, float scale,
                        int64_t window, int64_t first, int isa, int threads);

#endif
