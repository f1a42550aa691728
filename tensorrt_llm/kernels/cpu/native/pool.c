#include "pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#define MOST_THREADS 256

// Kernels follow each other within some 10 us in a step, and steps within 300 us: a thread that slept would be woken in
// 50 us each time.
static const int64_t SPIN_NS = 400000;

// Upper half: pieces of the job, lower half: the next one. So one atomic add takes a piece and tells whether there was
// one, even for a thread that slept through several jobs. A job's function stays until all of its pieces are done.
static _Atomic uint64_t claim;
static _Atomic uint64_t done;
static piece_function job_function;
static void *job_data;

static int wanted = 1;
static int started = 0;  // threads beside the caller
static _Atomic int sleeping;
static pthread_t threads[MOST_THREADS];
static pthread_mutex_t job_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static _Atomic int leaving;  // threads with a number from here on end

struct scratch {
    void *memory;
    size_t bytes;
};
static struct scratch scratches[MOST_THREADS + 1];

static int is_open(uint64_t state) { return (uint32_t)state < state >> 32; }

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void take_pieces(int thread) {
    while (is_open(atomic_load_explicit(&claim, memory_order_acquire))) {
        uint64_t mine = atomic_fetch_add_explicit(&claim, 1, memory_order_acq_rel);
        if (!is_open(mine)) return;
        job_function(job_data, (uint32_t)mine, thread);
        atomic_fetch_add_explicit(&done, 1, memory_order_release);
    }
}

static int must_leave(int thread) { return thread >= atomic_load_explicit(&leaving, memory_order_relaxed); }

static void wait_for_job(int thread) {
    int64_t until = now_ns() + SPIN_NS;
    do {
        for (int turn = 0; turn < 256; turn++) {
            if (is_open(atomic_load_explicit(&claim, memory_order_acquire)) || must_leave(thread)) return;
            __builtin_ia32_pause();
        }
    } while (now_ns() < until);
    pthread_mutex_lock(&sleep_lock);
    atomic_fetch_add(&sleeping, 1);
    while (!is_open(atomic_load(&claim)) && !must_leave(thread)) pthread_cond_wait(&wake, &sleep_lock);
    atomic_fetch_sub(&sleeping, 1);
    pthread_mutex_unlock(&sleep_lock);
}

static void *work(void *number) {
    int thread = (int)(intptr_t)number;
    while (!must_leave(thread)) {
        take_pieces(thread);
        wait_for_job(thread);
    }
    return NULL;
}

static void wake_all(void) {
    pthread_mutex_lock(&sleep_lock);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&sleep_lock);
}

// A child process has the memory of its parent, but none of its threads.
static void forget_threads(void) {
    started = 0;
    atomic_store(&sleeping, 0);
    atomic_store(&claim, 0);
    pthread_mutex_init(&job_lock, NULL);
    pthread_mutex_init(&sleep_lock, NULL);
    pthread_cond_init(&wake, NULL);
}

static void start_threads(void) {
    static int registered;
    if (!registered) {
        registered = 1;
        pthread_atfork(NULL, NULL, forget_threads);
    }
    atomic_store(&leaving, wanted);
    while (started < wanted - 1) {
        int thread = started + 1;
        if (pthread_create(&threads[thread], NULL, work, (void *)(intptr_t)thread)) return;
        started++;
    }
}

static void stop_threads_from(int first) {
    atomic_store(&leaving, first);
    wake_all();
    while (started >= first) pthread_join(threads[started--], NULL);
}

void pool_set_threads(int count) {
    pool_lock();
    wanted = count < 1 ? 1 : count > MOST_THREADS ? MOST_THREADS : count;
    if (started >= wanted) stop_threads_from(wanted);
    pool_unlock();
}

int pool_threads(void) { return wanted; }

void pool_lock(void) { pthread_mutex_lock(&job_lock); }

void pool_unlock(void) { pthread_mutex_unlock(&job_lock); }

void pool_run(piece_function function, void *job, size_t pieces) {
    if (pieces <= 1 || wanted == 1) {
        for (size_t piece = 0; piece < pieces; piece++) function(job, piece, 0);
        return;
    }
    if (started < wanted - 1) start_threads();
    job_function = function;
    job_data = job;
    atomic_store_explicit(&done, 0, memory_order_relaxed);
    atomic_store(&claim, (uint64_t)pieces << 32);
    if (atomic_load(&sleeping)) wake_all();
    take_pieces(0);
    while (atomic_load_explicit(&done, memory_order_acquire) < pieces) __builtin_ia32_pause();
}

void *pool_scratch(int thread, size_t bytes) {
    struct scratch *own = &scratches[thread + 1];
    if (own->bytes < bytes) {
        free(own->memory);
        own->bytes = (bytes + 4095) & ~(size_t)4095;
        own->memory = aligned_alloc(64, own->bytes);
        if (!own->memory) own->bytes = 0;
    }
    return own->memory;
}
