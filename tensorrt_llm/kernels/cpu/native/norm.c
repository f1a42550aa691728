// y = x / sqrt(mean(x^2) + eps) * weight, row by row in float32, rounded once.
#include "norm.h"

#include <math.h>

#include "pool.h"
#include "vec.h"

// Few rows are done before another thread would have noticed.
#define ROWS_OF_PIECE 16

INLINE __m256 load_as(const void *memory, size_t index, size_t count, int format) {
    switch (format) {
    case FLOAT32: return load_some(memory, index, count, FLOAT32);
    case FLOAT16: return load_some(memory, index, count, FLOAT16);
    default: return load_some(memory, index, count, BFLOAT16);
    }
}

static void normalize_row(const struct norm *n, size_t row) {
    const size_t first = row * n->hidden;
    __m256 squares = _mm256_setzero_ps();
    for (size_t column = 0; column < n->hidden; column += 8) {
        size_t count = n->hidden - column;
        __m256 x = load_as(n->x, first + column, count, n->x_format);
        if (n->added) {
            x = _mm256_add_ps(x, load_as(n->added, first + column, count, n->added_format));
            store_some(n->residual, first + column, count, x, FLOAT32);
        }
        squares = _mm256_fmadd_ps(x, x, squares);
    }
    const void *source = n->added ? n->residual : n->x;
    const int format = n->added ? FLOAT32 : n->x_format;
    const __m256 scale = _mm256_set1_ps(1.0f / sqrtf(sum8(squares) / (float)n->hidden + n->eps));
    for (size_t column = 0; column < n->hidden; column += 8) {
        size_t count = n->hidden - column;
        __m256 x = load_as(source, first + column, count, format);
        __m256 y = _mm256_mul_ps(_mm256_mul_ps(x, scale), load_some(n->weight, column, count, FLOAT32));
        switch (n->y_format) {
        case FLOAT32: store_some(n->y, first + column, count, y, FLOAT32); break;
        case FLOAT16: store_some(n->y, first + column, count, y, FLOAT16); break;
        default: store_some(n->y, first + column, count, y, BFLOAT16); break;
        }
    }
}

static void normalize_piece(void *data, size_t piece, int thread) {
    (void)thread;
    const struct norm *n = data;
    for (size_t row = piece * ROWS_OF_PIECE; row < (piece + 1) * ROWS_OF_PIECE && row < n->tokens; row++) {
        normalize_row(n, row);
    }
}

void normalize(const struct norm *norm) {
    pool_run(normalize_piece, (void *)norm, (norm->tokens + ROWS_OF_PIECE - 1) / ROWS_OF_PIECE);
}
