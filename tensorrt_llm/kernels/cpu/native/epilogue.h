// What becomes of sums: bias or gate, one rounding, and their place in y. Shared by the files of matmuls.
#pragma once
#include "matmul.h"
#include "vec.h"

INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

INLINE __m256 finished(const struct product *p, size_t row, size_t count, __m256 branch, __m256 gate) {
    if (p->gate.rows) return _mm256_mul_ps(silu8(branch), gate);
    return p->bias ? _mm256_add_ps(branch, load_some(p->bias, row, count, FLOAT32)) : branch;
}

INLINE void put(const struct product *p, size_t token, size_t row, size_t count, __m256 y) {
    switch (p->y_format) {
    case FLOAT32: store_some(p->y, token * p->n + row, count, y, FLOAT32); break;
    case FLOAT16: store_some(p->y, token * p->n + row, count, y, FLOAT16); break;
    default: store_some(p->y, token * p->n + row, count, y, BFLOAT16); break;
    }
}
