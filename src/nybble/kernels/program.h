/* A program is a list of kernel calls, recorded once and replayed with one call from Python (program.py). */
#ifndef NYB_PROGRAM_H
#define NYB_PROGRAM_H
#include <stdint.h>

typedef union {
  int64_t n;
  double f;
  void *p;
} nyb_value;

typedef int (*nyb_step)(const nyb_value *values);

/* One call: the twin of a kernel, and where its arguments begin. */
typedef struct {
  nyb_step step;
  int64_t first;
} nyb_record;

/* An argument that is `each` times one of the counts of a replay: tokens, sequences, outputs. */
typedef struct {
  int64_t value, count, each;
} nyb_patch;

/* The twin of a kernel: arguments from an array, in the order of the Python signature; returns 0, or what failed. */
#define NYB_STEP(name) int name##_step(const nyb_value *v)

/* Calls the records in order, after the patches. Returns 0, or 1 + the index of the first that failed. With `ticks`
 * [records] the nanoseconds of each are added there. */
int64_t nyb_program_run(const nyb_record *records, int64_t count, nyb_value *values, const nyb_patch *patches,
                        int64_t patched, const int64_t *counts, int64_t *ticks);
#endif
