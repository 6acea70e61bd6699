/* A pool of worker threads shared by every kernel of the library.
 *
 * nyb_parallel(task, context, count, threads) calls task(context, i) once for each i in [0, count), on the calling
 * thread and at most threads - 1 workers, and returns when all are done. Calls from several threads are serialised.
 * Workers spin briefly between jobs, then sleep in the kernel: a foreign busy process costs its share, not more. */
#ifndef NYB_POOL_H
#define NYB_POOL_H
#include <stdint.h>

typedef void (*nyb_task)(void *context, int64_t index);
void nyb_parallel(nyb_task task, void *context, int64_t count, int threads);

#endif
