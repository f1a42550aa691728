// One token streams the weight; several share it, a panel of rows at a time.
//
// An element of y has the same bits in any batch and with any threads, as both ways add in one order:
//
//     lane l of sum    = -zero[group] (x[l] + x[l + 8] + ...) + x[l] w[l] + x[l + 8] w[l + 8] + ...  (in a group)
//     lane l of total  = ... + scale[group] sum
//     y                = ((total[0] + total[1]) + (total[2] + total[3])) + ((total[4] + ...
////
// int4 weights are multiplied in int4.c.
#include "matmul.h"

#include "epilogue.h"
#include "pool.h"
#include "vec.h"

// For one token a thread follows eight streams of memory, each of neighbouring rows: the processor fetches ahead what
// goes on for long. Eight neighbouring rows of 1792 bytes at a time are read at 16 to 20 GB/s, far ones at 26 to 35 (two
// threads, EPYC 7003).
#define STREAMS 8
#define MOST_ROWS_OF_STREAM 64
#define PIECES_OF_PRODUCT 16
#define BYTES_AHEAD 256
#define PANEL_ROWS 24     // of a weight at once, for several tokens
#define PANEL_COLUMNS 1024
#define TILE_ROWS 3       // 3 x 4 sums, 4 x and a row's w fill the 16 registers
#define TILE_TOKENS 4
#define MOST_TOKENS 64    // that share one reading of the weight

struct job {
    const struct product *product;
    size_t width;         // groups * padded
    size_t first_token, tokens;
    size_t rows_of_stream;
    float *x;             // [tokens, groups, padded]
    float *x_sums;        // [tokens, groups, 8]
};

// x as the weight wants it

INLINE void lay_out_group(const struct product *p, size_t from, float *x, float *x_sums, enum format format) {
    __m256 sums = _mm256_setzero_ps();
    for (size_t column = 0; column < p->padded; column += 8) {
        size_t count = column < p->columns ? p->columns - column : 0;
        __m256 part = count ? load_some(p->x, from + column, count, format) : _mm256_setzero_ps();
        sums = _mm256_add_ps(sums, part);
        _mm256_storeu_ps(x + column, part);
    }
    _mm256_storeu_ps(x_sums, sums);
}

static void lay_out_token(void *data, size_t token, int thread) {
    (void)thread;
    const struct job *job = data;
    const struct product *p = job->product;
    for (size_t group = 0; group < p->groups; group++) {
        size_t from = ((job->first_token + token) * p->groups + group) * p->columns;
        float *x = job->x + token * job->width + group * p->padded;
        float *sums = job->x_sums + (token * p->groups + group) * 8;
        switch (p->x_format) {
        case FLOAT32: lay_out_group(p, from, x, sums, FLOAT32); break;
        case FLOAT16: lay_out_group(p, from, x, sums, FLOAT16); break;
        default: lay_out_group(p, from, x, sums, BFLOAT16); break;
        }
    }
}

// What both ways share

// What a row's sum over a group starts from: that which is stored is larger than the weight by `zero`.
INLINE __m256 start_of(const struct product *p, const struct weight *w, size_t row, size_t group, __m256 x_sum) {
    if (!w->zero) return _mm256_setzero_ps();
    return _mm256_mul_ps(_mm256_set1_ps(-w->zero[row * p->groups + group]), x_sum);
}

INLINE __m256 add_group(const struct product *p, const struct weight *w, size_t row, size_t group, __m256 sum,
                        __m256 total) {
    return _mm256_fmadd_ps(_mm256_broadcast_ss(w->scale + row * p->groups + group), sum, total);
}

// One token

// Sums of eight rows that lie `apart` rows from each other.
INLINE __m256 stream8(const struct job *job, const struct weight *w, size_t first, size_t apart, enum format format) {
    const struct product *p = job->product;
    const size_t pitch = job->width * bytes_of(format);
    size_t row[STREAMS];
    const char *rows[STREAMS];
    __m256 total[STREAMS];
    for (int r = 0; r < STREAMS; r++) {
        row[r] = smaller(first + r * apart, p->n - 1);
        rows[r] = (const char *)w->rows + row[r] * pitch;
        total[r] = _mm256_setzero_ps();
    }
    for (size_t group = 0; group < p->groups; group++) {
        const size_t end = (group + 1) * p->padded;
        const __m256 x_sum = _mm256_loadu_ps(job->x_sums + group * 8);
        __m256 sum[STREAMS];
        for (int r = 0; r < STREAMS; r++) {
            sum[r] = r == 0 || w->zero ? start_of(p, w, row[r], group, x_sum) : sum[0];
        }
        for (size_t column = group * p->padded; column < end; column += 64) {
            const size_t byte = column * bytes_of(format);
            const float *x = job->x + column;
            for (size_t line = 0; line < 64 * bytes_of(format); line += 64) {
                for (int r = 0; r < STREAMS; r++) _mm_prefetch(rows[r] + byte + line + BYTES_AHEAD, _MM_HINT_T0);
            }
            for (int j = 0; j < 8; j++) {
                __m256 x8 = _mm256_loadu_ps(x + 8 * j);
                for (int r = 0; r < STREAMS; r++) {
                    sum[r] = _mm256_fmadd_ps(load8(rows[r] + byte, 8 * j, format), x8, sum[r]);
                }
            }
        }
        for (int r = 0; r < STREAMS; r++) {
            total[r] = format <= BFLOAT16 ? sum[r] : add_group(p, w, row[r], group, sum[r], total[r]);
        }
    }
    return sum_each(total);
}

INLINE void stream_piece(const struct job *job, size_t piece, enum format format) {
    const struct product *p = job->product;
    const size_t apart = job->rows_of_stream, first = piece * STREAMS * apart;
    float branches[2][STREAMS * MOST_ROWS_OF_STREAM];
    for (int branch = 0; branch < (p->gate.rows ? 2 : 1); branch++) {
        for (size_t row = 0; row < apart; row++) {
            float sums[STREAMS];
            _mm256_storeu_ps(sums, stream8(job, branch ? &p->gate : &p->weight, first + row, apart, format));
            for (int r = 0; r < STREAMS; r++) branches[branch][r * apart + row] = sums[r];
        }
    }
    const size_t end = smaller(first + STREAMS * apart, p->n);
    for (size_t row = first; row < end; row += 8) {
        __m256 branch = _mm256_loadu_ps(branches[0] + row - first), gate = _mm256_loadu_ps(branches[1] + row - first);
        put(p, job->first_token, row, end - row, finished(p, row, end - row, branch, gate));
    }
}

static void stream_float32(void *job, size_t piece, int thread) { (void)thread, stream_piece(job, piece, FLOAT32); }
static void stream_float16(void *job, size_t piece, int thread) { (void)thread, stream_piece(job, piece, FLOAT16); }
static void stream_bfloat16(void *job, size_t piece, int thread) { (void)thread, stream_piece(job, piece, BFLOAT16); }
static void stream_int8(void *job, size_t piece, int thread) { (void)thread, stream_piece(job, piece, INT8); }

static const piece_function stream[] = {stream_float32, stream_float16, stream_bfloat16, stream_int8};

// Several tokens

// A panel's rows as floats, and sums and totals of its elements of y; of one thread.
struct panel {
    float widened[PANEL_ROWS][PANEL_COLUMNS];
    float sums[MOST_TOKENS][PANEL_ROWS][8];
    float totals[MOST_TOKENS][PANEL_ROWS][8];
    float branches[2][MOST_TOKENS][PANEL_ROWS];
};

INLINE void widen_row(const char *row, float *widened, size_t columns, enum format format) {
    for (size_t column = 0; column < columns; column += 8) {
        _mm256_store_ps(widened + column, load8(row, column, format));
    }
}

static void widen_panel(const struct job *job, const struct weight *w, size_t first, size_t from, size_t to,
                        struct panel *panel) {
    enum format format = job->product->format;
    size_t pitch = job->width * bytes_of(format);
    for (size_t r = 0; r < PANEL_ROWS; r++) {
        const char *row = (const char *)w->rows + smaller(first + r, job->product->n - 1) * pitch;
        row += from * bytes_of(format);
        switch (format) {
        case FLOAT32: widen_row(row, panel->widened[r], to - from, FLOAT32); break;
        case FLOAT16: widen_row(row, panel->widened[r], to - from, FLOAT16); break;
        case BFLOAT16: widen_row(row, panel->widened[r], to - from, BFLOAT16); break;
        default: widen_row(row, panel->widened[r], to - from, INT8); break;
        }
    }
}

// Adds columns from .. to of one group to the sums of `tokens` x TILE_ROWS elements, and a group that ends to the totals.
INLINE void add_tile(const struct job *job, const struct weight *w, struct panel *panel, size_t panel_row,
                     size_t panel_column, size_t token, int tokens, size_t r, size_t from, size_t to) {
    const struct product *p = job->product;
    const size_t group = from / p->padded;
    const float *w_rows[TILE_ROWS], *x_rows[TILE_TOKENS];
    __m256 sum[TILE_TOKENS][TILE_ROWS];
    for (int i = 0; i < TILE_ROWS; i++) w_rows[i] = panel->widened[r + i] + from - panel_column;
    for (int t = 0; t < tokens; t++) {
        x_rows[t] = job->x + (token + t) * job->width + from;
        for (int i = 0; i < TILE_ROWS; i++) {
            __m256 x_sum = _mm256_loadu_ps(job->x_sums + ((token + t) * p->groups + group) * 8);
            sum[t][i] = from > group * p->padded ? _mm256_load_ps(panel->sums[token + t][r + i])
                                                 : start_of(p, w, smaller(panel_row + r + i, p->n - 1), group, x_sum);
        }
    }
    for (size_t column = 0; column < to - from; column += 8) {
        __m256 x8[TILE_TOKENS];
        for (int t = 0; t < tokens; t++) x8[t] = _mm256_loadu_ps(x_rows[t] + column);
        for (int i = 0; i < TILE_ROWS; i++) {
            __m256 w8 = _mm256_load_ps(w_rows[i] + column);
            for (int t = 0; t < tokens; t++) sum[t][i] = _mm256_fmadd_ps(w8, x8[t], sum[t][i]);
        }
    }
    int group_ends = to == (group + 1) * p->padded;
    for (int t = 0; t < tokens; t++) {
        for (int i = 0; i < TILE_ROWS; i++) {
            float *total = panel->totals[token + t][r + i];
            if (!group_ends) {
                _mm256_store_ps(panel->sums[token + t][r + i], sum[t][i]);
            } else if (!w->scale) {
                _mm256_store_ps(total, sum[t][i]);
            } else {
                __m256 before = group ? _mm256_load_ps(total) : _mm256_setzero_ps();
                size_t row = smaller(panel_row + r + i, p->n - 1);
                _mm256_store_ps(total, add_group(p, w, row, group, sum[t][i], before));
            }
        }
    }
}

// The totals of a panel: columns block by block, each widened once for all tokens.
static void multiply_panel(const struct job *job, const struct weight *w, size_t first, struct panel *panel) {
    const struct product *p = job->product;
    const size_t groups_of_block = p->padded < PANEL_COLUMNS ? PANEL_COLUMNS / p->padded : 1;
    const size_t segment = smaller(p->padded, PANEL_COLUMNS);
    for (size_t from = 0, to; from < job->width; from = to) {
        size_t end_of_group = (from / p->padded + groups_of_block) * p->padded;
        to = smaller(smaller(from + groups_of_block * segment, end_of_group), job->width);
        widen_panel(job, w, first, from, to, panel);
        for (size_t token = 0; token < job->tokens; token += TILE_TOKENS) {
            for (size_t r = 0; r < PANEL_ROWS; r += TILE_ROWS) {
                for (size_t at = from, next; at < to; at = next) {
                    next = smaller(at + segment, to);
                    switch (job->tokens - token) {
                    case 1: add_tile(job, w, panel, first, from, token, 1, r, at, next); break;
                    case 2: add_tile(job, w, panel, first, from, token, 2, r, at, next); break;
                    case 3: add_tile(job, w, panel, first, from, token, 3, r, at, next); break;
                    default: add_tile(job, w, panel, first, from, token, TILE_TOKENS, r, at, next); break;
                    }
                }
            }
        }
    }
}

static void multiply_piece(void *data, size_t piece, int thread) {
    const struct job *job = data;
    const struct product *p = job->product;
    struct panel *panel = pool_scratch(thread, sizeof(struct panel));
    size_t first = piece * PANEL_ROWS, end = smaller(first + PANEL_ROWS, p->n);
    for (int branch = 0; branch < (p->gate.rows ? 2 : 1); branch++) {
        multiply_panel(job, branch ? &p->gate : &p->weight, first, panel);
        for (size_t token = 0; token < job->tokens; token++) {
            for (size_t r = 0; r < PANEL_ROWS; r += 8) {
                __m256 total[8];
                for (int i = 0; i < 8; i++) total[i] = _mm256_load_ps(panel->totals[token][r + i]);
                _mm256_store_ps(panel->branches[branch][token] + r, sum_each(total));
            }
        }
    }
    for (size_t token = 0; token < job->tokens; token++) {
        for (size_t row = first; row < end; row += 8) {
            __m256 fc = _mm256_load_ps(panel->branches[0][token] + row - first);
            __m256 gate = _mm256_load_ps(panel->branches[1][token] + row - first);
            put(p, job->first_token + token, row, end - row, finished(p, row, end - row, fc, gate));
        }
    }
}

int multiply(const struct product *product) {
    if (product->format == INT4) return multiply_int4(product);
    struct job job = {.product = product, .width = product->groups * product->padded};
    size_t together = smaller(product->tokens, MOST_TOKENS);
    size_t x_bytes = together * job.width * sizeof(float);
    job.x = pool_scratch(-1, x_bytes + together * product->groups * 8 * sizeof(float));
    if (!job.x) return -1;
    for (int thread = 0; together > 1 && thread < pool_threads(); thread++) {
        if (!pool_scratch(thread, sizeof(struct panel))) return -1;
    }
    job.x_sums = job.x + x_bytes / sizeof(float);
    size_t rows_of_stream = (product->n + PIECES_OF_PRODUCT * STREAMS - 1) / (PIECES_OF_PRODUCT * STREAMS);
    job.rows_of_stream = smaller(rows_of_stream, MOST_ROWS_OF_STREAM);
    for (; job.first_token < product->tokens; job.first_token += job.tokens) {
        job.tokens = smaller(product->tokens - job.first_token, MOST_TOKENS);
        if (job.tokens == 1) {
            lay_out_token(&job, 0, 0);
            size_t rows = job.rows_of_stream * STREAMS;
            pool_run(stream[product->format], &job, (product->n + rows - 1) / rows);
        } else {
            pool_run(lay_out_token, &job, job.tokens);
            pool_run(multiply_piece, &job, (product->n + PANEL_ROWS - 1) / PANEL_ROWS);
        }
    }
    return 0;
}
