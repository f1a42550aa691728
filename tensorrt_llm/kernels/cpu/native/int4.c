// int4 weights, in exact integers: x becomes three int8 digits of a 24-bit fixed-point number,
//
//     x[t, k] = step[t] (65536 h + 256 m + l),   step[t] = largest of |x[t]| / (127 * 65536)
//
// which is float32's precision. A nibble is 0..15, so u8 times s8 products of 128 columns fit: pairs in int16, eight of
// them to a lane, and digits put together, 16 * 15 * 2^23, in int32. That takes 45 instructions for 128 weights, where
// widening them to floats takes 60; both are bound by instructions: 15 GB/s a core instead of 11 (EPYC 7003, from L2).
//
//     lane l of total = ... + scale[group] (exact sum over 128 columns or fewer)      (the first of a group less zero sums)
//
// in this order for any number of tokens, so a row's bits depend on nothing else.
#include <math.h>

#include "epilogue.h"
#include "pool.h"

#define SEGMENT 128             // columns, two loads of nibbles
#define MOST_TOKENS 32          // that share one reading of the weight: their digits of a segment fit the L1 cache
#define ROWS_OF_PANEL 24
// As in matmul.c.
#define STREAMS 8
#define MOST_ROWS_OF_STREAM 64
#define PIECES_OF_PRODUCT 16
#define BYTES_AHEAD 1024
#define SCALE_BYTES_AHEAD 256

static const float FULL_SCALE = 127 * 65536;

struct job {
    const struct product *product;
    size_t width;               // groups * padded
    size_t first_token, tokens;
    size_t rows_of_stream;
    uint8_t *digits;            // [width / 64, tokens, 3, 2, 32]: of 64 columns, by digit, the even ones, then the odd ones
    float *x_sums;              // [tokens, groups, 8], in steps
    float *steps;               // [tokens]
};

// x as digits

// The low bytes of 64 int32 as bytes: those of even places, then those of odd places.
INLINE void store_bytes(uint8_t *to, const __m256i values[8]) {
    const __m256i low = _mm256_set1_epi32(255), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i half[2];
    for (int i = 0; i < 2; i++) {
        const __m256i *v = values + 4 * i;
        __m256i ab = _mm256_packus_epi32(_mm256_and_si256(v[0], low), _mm256_and_si256(v[1], low));
        __m256i cd = _mm256_packus_epi32(_mm256_and_si256(v[2], low), _mm256_and_si256(v[3], low));
        half[i] = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(ab, cd), order);
    }
    const __m256i byte = _mm256_set1_epi16(255);
    __m256i even = _mm256_packus_epi16(_mm256_and_si256(half[0], byte), _mm256_and_si256(half[1], byte));
    __m256i odd = _mm256_packus_epi16(_mm256_srli_epi16(half[0], 8), _mm256_srli_epi16(half[1], 8));
    _mm256_storeu_si256((__m256i *)to, _mm256_permute4x64_epi64(even, 0xD8));
    _mm256_storeu_si256((__m256i *)to + 1, _mm256_permute4x64_epi64(odd, 0xD8));
}

INLINE __m256i signed_low_byte(__m256i x) { return _mm256_srai_epi32(_mm256_slli_epi32(x, 24), 24); }

INLINE void lay_out(const struct job *job, size_t token, enum format format) {
    const struct product *p = job->product;
    const size_t from = (job->first_token + token) * p->groups * p->columns, columns = p->groups * p->columns;
    __m256 most = _mm256_setzero_ps();
    for (size_t column = 0; column < columns; column += 8) {
        __m256 x = load_some(p->x, from + column, columns - column, format);
        // A NaN comes back as it is the second operand, and stays as what follows is the first.
        __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x);
        __m256 is_nan = _mm256_cmp_ps(most, most, _CMP_UNORD_Q);
        most = _mm256_blendv_ps(_mm256_max_ps(most, size), most, is_nan);
    }
    float lanes[8], largest = 0;
    _mm256_storeu_ps(lanes, most);
    for (int i = 0; i < 8; i++) {
        if (lanes[i] > largest || isnan(lanes[i])) largest = lanes[i];
    }
    job->steps[token] = largest / FULL_SCALE;
    // What is not finite stays so in the step, and thus in the row of y; next to nothing becomes zeros.
    const __m256 per_step = _mm256_set1_ps(largest > 1e-30f && largest <= 3.4e38f ? FULL_SCALE / largest : 0);
    uint8_t *digits = job->digits + token * 192;
    for (size_t group = 0; group < p->groups; group++) {
        __m256i sums = _mm256_setzero_si256();
        for (size_t column = 0; column < p->padded; column += 64, digits += job->tokens * 192) {
            __m256i fixed[8], digit[8];
            for (int j = 0; j < 8; j++) {
                size_t at = column + 8 * j;
                __m256 x = _mm256_setzero_ps();
                if (at < p->columns) x = load_some(p->x, from + group * p->columns + at, p->columns - at, format);
                // 0 times what is not finite is no number; its digits are to be zeros.
                x = _mm256_and_ps(x, _mm256_cmp_ps(per_step, _mm256_setzero_ps(), _CMP_GT_OQ));
                fixed[j] = _mm256_cvtps_epi32(_mm256_mul_ps(x, per_step));
                sums = _mm256_add_epi32(sums, fixed[j]);
            }
            for (int place = 2; place >= 0; place--) {
                for (int j = 0; j < 8; j++) {
                    digit[j] = signed_low_byte(fixed[j]);
                    fixed[j] = _mm256_srai_epi32(_mm256_sub_epi32(fixed[j], digit[j]), 8);
                }
                store_bytes(digits + place * 64, digit);
            }
        }
        _mm256_storeu_ps(job->x_sums + (token * p->groups + group) * 8, _mm256_cvtepi32_ps(sums));
    }
}

static void lay_out_token(void *data, size_t token, int thread) {
    (void)thread;
    const struct job *job = data;
    switch (job->product->x_format) {
    case FLOAT32: lay_out(job, token, FLOAT32); break;
    case FLOAT16: lay_out(job, token, FLOAT16); break;
    default: lay_out(job, token, BFLOAT16); break;
    }
}

// Sums

// Nibbles of 64 columns: the even ones, then the odd ones.
INLINE void unpack(const void *row, __m256i nibbles[2]) {
    const __m256i low = _mm256_set1_epi8(15), words = _mm256_loadu_si256(row);
    nibbles[0] = _mm256_and_si256(words, low);
    nibbles[1] = _mm256_and_si256(_mm256_srli_epi16(words, 4), low);
}

// The exact sums of `blocks` (1 or 2) times 64 columns, 8 lanes, in steps.
INLINE __m256 exact_sums(const __m256i nibbles[4], const uint8_t *digits, size_t block_bytes, int blocks) {
    __m256i sum[3];
    for (int place = 0; place < 3; place++) {
        for (int i = 0; i < 2 * blocks; i++) {
            const __m256i *at = (const __m256i *)(digits + (i / 2) * block_bytes + place * 64) + i % 2;
            __m256i pairs = _mm256_maddubs_epi16(nibbles[i], _mm256_loadu_si256(at));
            sum[place] = i ? _mm256_add_epi16(sum[place], pairs) : pairs;
        }
    }
    const __m256i one = _mm256_set1_epi16(1);
    __m256i upper = _mm256_add_epi32(_mm256_madd_epi16(sum[0], _mm256_set1_epi16(256)), _mm256_madd_epi16(sum[1], one));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(upper, 8), _mm256_madd_epi16(sum[2], one)));
}

// What a group's sum over q + 8 (or q with a zero) is too large by, less than nothing.
INLINE __m256 start_of(const struct product *p, const struct weight *w, size_t row, size_t group, __m256 x_sum) {
    float excess = w->zero ? w->zero[row * p->groups + group] : 8;
    return _mm256_mul_ps(_mm256_set1_ps(-excess), x_sum);
}

INLINE __m256 add_scaled(const struct product *p, const struct weight *w, size_t row, size_t group, __m256 sum,
                         __m256 total) {
    return _mm256_fmadd_ps(_mm256_broadcast_ss(w->scale + row * p->groups + group), sum, total);
}

// One token

INLINE void stream_segment(const struct job *job, const struct weight *w, const char *const rows[STREAMS],
                           const size_t row[STREAMS], size_t group, size_t column, int blocks, __m256 total[STREAMS]) {
    const struct product *p = job->product;
    const uint8_t *digits = job->digits + column * 3;
    const int begins_group = column == group * p->padded;
    const __m256 x_sum = _mm256_loadu_ps(job->x_sums + group * 8);
    const __m256 start = _mm256_mul_ps(_mm256_set1_ps(-8), x_sum);
    for (int r = 0; r < STREAMS; r++) {
        __m256i nibbles[4];
        _mm_prefetch(rows[r] + column / 2 + BYTES_AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)(w->scale + row[r] * p->groups + group) + SCALE_BYTES_AHEAD, _MM_HINT_T0);
        __asm__("" : "+r"(digits));  // else the compiler keeps twelve addresses instead of one, most of them in memory
        for (int block = 0; block < blocks; block++) unpack(rows[r] + column / 2 + 32 * block, nibbles + 2 * block);
        __m256 sum = exact_sums(nibbles, digits, 192, blocks);
        if (begins_group) sum = _mm256_add_ps(sum, w->zero ? start_of(p, w, row[r], group, x_sum) : start);
        total[r] = add_scaled(p, w, row[r], group, sum, total[r]);
    }
}

static __m256 stream8(const struct job *job, const struct weight *w, size_t first, size_t apart) {
    const struct product *p = job->product;
    const size_t pitch = job->width / 2;
    size_t row[STREAMS];
    const char *rows[STREAMS];
    __m256 total[STREAMS];
    for (int r = 0; r < STREAMS; r++) {
        row[r] = smaller(first + r * apart, p->n - 1);
        rows[r] = (const char *)w->rows + row[r] * pitch;
        total[r] = _mm256_setzero_ps();
    }
    for (size_t group = 0, column = 0; group < p->groups; group++) {
        const size_t end = column + p->padded;
        for (; end - column >= SEGMENT; column += SEGMENT) stream_segment(job, w, rows, row, group, column, 2, total);
        for (; column < end; column += 64) stream_segment(job, w, rows, row, group, column, 1, total);
    }
    return sum_each(total);
}

static void stream_piece(void *data, size_t piece, int thread) {
    (void)thread;
    const struct job *job = data;
    const struct product *p = job->product;
    const size_t apart = job->rows_of_stream, first = piece * STREAMS * apart;
    const __m256 step = _mm256_set1_ps(job->steps[0]);
    float branches[2][STREAMS * MOST_ROWS_OF_STREAM];
    for (int branch = 0; branch < (p->gate.rows ? 2 : 1); branch++) {
        for (size_t row = 0; row < apart; row++) {
            float sums[STREAMS];
            _mm256_storeu_ps(sums, stream8(job, branch ? &p->gate : &p->weight, first + row, apart));
            for (int r = 0; r < STREAMS; r++) branches[branch][r * apart + row] = sums[r];
        }
    }
    const size_t end = smaller(first + STREAMS * apart, p->n);
    for (size_t row = first; row < end; row += 8) {
        __m256 branch = _mm256_mul_ps(_mm256_loadu_ps(branches[0] + row - first), step);
        __m256 gate = _mm256_mul_ps(_mm256_loadu_ps(branches[1] + row - first), step);
        put(p, job->first_token, row, end - row, finished(p, row, end - row, branch, gate));
    }
}

// Several tokens

struct panel {
    float totals[ROWS_OF_PANEL][MOST_TOKENS][8];
    float branches[2][MOST_TOKENS][ROWS_OF_PANEL];
};

INLINE void add_segment(const struct job *job, const struct weight *w, size_t first, size_t group, size_t column,
                        int blocks, struct panel *panel) {
    const struct product *p = job->product;
    const uint8_t *digits = job->digits + column * 3 * job->tokens;
    const int begins_group = column == group * p->padded;
    for (size_t r = 0; r < ROWS_OF_PANEL; r++) {
        const size_t row = smaller(first + r, p->n - 1);
        const char *at = (const char *)w->rows + (row * job->width + column) / 2;
        __m256i nibbles[4];
        for (int block = 0; block < blocks; block++) unpack(at + 32 * block, nibbles + 2 * block);
        for (size_t token = 0; token < job->tokens; token++) {
            __m256 sum = exact_sums(nibbles, digits + token * 192, job->tokens * 192, blocks);
            if (begins_group) {
                __m256 x_sum = _mm256_loadu_ps(job->x_sums + (token * p->groups + group) * 8);
                sum = _mm256_add_ps(sum, start_of(p, w, row, group, x_sum));
            }
            float *total = panel->totals[r][token];
            __m256 before = column ? _mm256_load_ps(total) : _mm256_setzero_ps();
            _mm256_store_ps(total, add_scaled(p, w, row, group, sum, before));
        }
    }
}

static void multiply_panel(void *data, size_t piece, int thread) {
    const struct job *job = data;
    const struct product *p = job->product;
    struct panel *panel = pool_scratch(thread, sizeof(struct panel));
    const size_t first = piece * ROWS_OF_PANEL, end = smaller(first + ROWS_OF_PANEL, p->n);
    for (int branch = 0; branch < (p->gate.rows ? 2 : 1); branch++) {
        const struct weight *w = branch ? &p->gate : &p->weight;
        for (size_t group = 0, column = 0; group < p->groups; group++) {
            const size_t group_end = column + p->padded;
            for (; group_end - column >= SEGMENT; column += SEGMENT) add_segment(job, w, first, group, column, 2, panel);
            for (; column < group_end; column += 64) add_segment(job, w, first, group, column, 1, panel);
        }
        for (size_t token = 0; token < job->tokens; token++) {
            for (size_t r = 0; r < ROWS_OF_PANEL; r++) {
                float sum = sum8(_mm256_load_ps(panel->totals[r][token]));
                panel->branches[branch][token][r] = sum * job->steps[token];
            }
        }
    }
    for (size_t token = 0; token < job->tokens; token++) {
        for (size_t row = first; row < end; row += 8) {
            __m256 branch = _mm256_loadu_ps(panel->branches[0][token] + row - first);
            __m256 gate = _mm256_loadu_ps(panel->branches[1][token] + row - first);
            put(p, job->first_token + token, row, end - row, finished(p, row, end - row, branch, gate));
        }
    }
}

int multiply_int4(const struct product *product) {
    struct job job = {.product = product, .width = product->groups * product->padded};
    const size_t together = smaller(product->tokens, MOST_TOKENS);
    const size_t digit_bytes = together * job.width * 3, sum_bytes = together * product->groups * 8 * sizeof(float);
    job.digits = pool_scratch(-1, digit_bytes + sum_bytes + together * sizeof(float));
    if (!job.digits) return -1;
    for (int thread = 0; together > 1 && thread < pool_threads(); thread++) {
        if (!pool_scratch(thread, sizeof(struct panel))) return -1;
    }
    job.x_sums = (float *)(job.digits + digit_bytes);
    job.steps = job.x_sums + sum_bytes / sizeof(float);
    job.rows_of_stream = (product->n + PIECES_OF_PRODUCT * STREAMS - 1) / (PIECES_OF_PRODUCT * STREAMS);
    job.rows_of_stream = smaller(job.rows_of_stream, MOST_ROWS_OF_STREAM);
    for (; job.first_token < product->tokens; job.first_token += job.tokens) {
        job.tokens = smaller(product->tokens - job.first_token, MOST_TOKENS);
        pool_run(lay_out_token, &job, job.tokens);
        if (job.tokens == 1) {
            size_t rows = job.rows_of_stream * STREAMS;
            pool_run(stream_piece, &job, (product->n + rows - 1) / rows);
        } else {
            pool_run(multiply_panel, &job, (product->n + ROWS_OF_PANEL - 1) / ROWS_OF_PANEL);
        }
    }
    return 0;
}
