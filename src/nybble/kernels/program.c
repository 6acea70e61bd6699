/* Replaying a program: see program.h. */
#define _POSIX_C_SOURCE 199309L
#include "program.h"

#include <stddef.h>
#include <time.h>

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int64_t nyb_program_run(const nyb_record *records, int64_t count, nyb_value *values, const nyb_patch *patches,
                        int64_t patched, const int64_t *counts, int64_t *ticks) {
  for (int64_t i = 0; i < patched; i++) values[patches[i].value].n = patches[i].each * counts[patches[i].count];
  int64_t before = ticks ? now() : 0;
  for (int64_t i = 0; i < count; i++) {
    if (records[i].step(values + records[i].first)) return i + 1;
    if (!ticks) continue;
    int64_t after = now();
    ticks[i] += after - before;
    before = after;
  }
  return 0;
}
