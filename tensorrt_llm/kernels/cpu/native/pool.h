// A pool of threads that share the pieces of one job at a time.
//
// Pieces are claimed one by one, so a core that is busy elsewhere takes fewer. Which thread computes a piece is open:
// what a piece computes must not depend on it. Threads start with the first job of a process, spin for a moment after a
// job, as the next one is near while a step runs, and sleep after that.
#pragma once
#include <stddef.h>

typedef void (*piece_function)(void *job, size_t piece, int thread);

// Threads of the jobs that follow, the caller among them. Fewer start if the system has no more.
void pool_set_threads(int threads);
int pool_threads(void);

// Computes pieces 0 .. pieces - 1. One caller at a time: hold the pool's lock around a job and its scratch memory.
void pool_run(piece_function function, void *job, size_t pieces);
void pool_lock(void);
void pool_unlock(void);

// Memory of one thread (-1: of the caller, shared by the job's threads), valid until it is asked for again; NULL
// without memory. Aligned to 64 bytes.
void *pool_scratch(int thread, size_t bytes);
