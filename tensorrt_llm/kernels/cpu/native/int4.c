// int4 weights, in exact integers: 128 columns of x at a time (or 64 at the end of a group) become int8 digits of
// fixed-point numbers with a step of their own, two digits if x has 16 bits and three if it is float32,
//
//     x[t, k] = step[t, segment] (256 h + l),   step = largest of |x| in the segment / (127 * 256)
//
// Two are 16 bits. Their rounding makes less noise than that of x to float16 has made, at most 0.7 times it, whatever
// the outliers: one of size 1 costs 128 columns 1e-4 together, and is itself off by 1.4e-4 or more in float16. Three
// are float32's precision. A nibble is 0..15, so products of u8 and s8 fit: pairs in int16, eight of them to a lane,
// and digits put together, 16 * 15 * 2^23, in int32. Products are bound by instructions, and this takes the fewest:
// widening nibbles to floats reads 11 GB/s a core where two digits read 16 (EPYC 7003, from L3).
//
//     lane l of total = ... + scale[group] step[segment] (exact sum - zero[group] exact sum of x)
//
// in this order for any number of tokens, so a row's bits depend on nothing else.
#include <math.h>

#include "epilogue.h"
#include "pool.h"

#define SEGMENT 128             // columns, two loads of nibbles
#define MOST_TOKENS 32          // that share one reading of the weight: their digits of a segment fit the L1 cache
#define ROWS_OF_PANEL 24
// As in matmul.c. 256 bytes ahead: the products of 24 layers take 10.5 ms, 11.1 with 512, 11.6 with 1024 (EPYC 7003).
#define STREAMS 8
#define MOST_ROWS_OF_STREAM 64
#define PIECES_OF_PRODUCT 16
#define BYTES_AHEAD 256
#define SCALE_BYTES_AHEAD 256

struct job {
    const struct product *product;
    size_t width;               // groups * padded
    size_t segments_of_group;
    size_t places;              // digits of a number
    size_t first_token, tokens;
    size_t rows_of_stream;
    uint8_t *digits;            // [width / 64, tokens, places, 2, 32]: 64 columns, by digit, even ones, then odd ones
    float *x_sums;              // [tokens, segments, 8], in steps
    float *steps;               // [tokens, segments]
};

// 128 columns of a group, or 64 where less is left.
struct segment {
    size_t index, group, column;
    int blocks;  // of 64 columns
};

INLINE struct segment segment_of(const struct job *job, size_t index) {
    const size_t padded = job->product->padded, group = index / job->segments_of_group;
    const size_t offset = index % job->segments_of_group * SEGMENT;
    return (struct segment){index, group, group * padded + offset, padded - offset >= SEGMENT ? 2 : 1};
}

INLINE size_t segments(const struct job *job) { return job->product->groups * job->segments_of_group; }

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

INLINE void lay_out_segment(const struct job *job, size_t token, struct segment segment, enum format format) {
    const struct product *p = job->product;
    const size_t first = segment.column - segment.group * p->padded;
    const size_t from = ((job->first_token + token) * p->groups + segment.group) * p->columns + first;
    __m256 x[16], most = _mm256_setzero_ps(), is_nan = _mm256_setzero_ps();
    for (int j = 0; j < 8 * segment.blocks; j++) {
        const size_t at = first + 8 * j;
        x[j] = at < p->columns ? load_some(p->x, from + 8 * j, p->columns - at, format) : _mm256_setzero_ps();
        most = _mm256_max_ps(most, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x[j]));
        is_nan = _mm256_or_ps(is_nan, _mm256_cmp_ps(x[j], x[j], _CMP_UNORD_Q));
    }
    const float full_scale = job->places == 2 ? 127 * 256 : 127 * 65536;
    const float largest = _mm256_movemask_ps(is_nan) ? NAN : max8(most);
    // What is not finite stays so in the step, and thus in the row of y; next to nothing becomes zeros.
    job->steps[token * segments(job) + segment.index] = largest / full_scale;
    const int is_plain = largest > 1e-30f && isfinite(largest);
    const __m256 per_step = _mm256_set1_ps(is_plain ? full_scale / largest : 0);
    __m256i sums = _mm256_setzero_si256();
    for (int block = 0; block < segment.blocks; block++) {
        uint8_t *digits = job->digits + ((segment.column / 64 + block) * job->tokens + token) * job->places * 64;
        __m256i fixed[8], digit[8];
        for (int j = 0; j < 8; j++) {
            __m256 scaled = is_plain ? _mm256_mul_ps(x[8 * block + j], per_step) : _mm256_setzero_ps();
            fixed[j] = _mm256_cvtps_epi32(scaled);
            sums = _mm256_add_epi32(sums, fixed[j]);
        }
        for (size_t place = job->places; place-- > 0;) {
            for (int j = 0; j < 8; j++) {
                digit[j] = signed_low_byte(fixed[j]);
                fixed[j] = _mm256_srai_epi32(_mm256_sub_epi32(fixed[j], digit[j]), 8);
            }
            store_bytes(digits + place * 64, digit);
        }
    }
    _mm256_storeu_ps(job->x_sums + (token * segments(job) + segment.index) * 8, _mm256_cvtepi32_ps(sums));
}

INLINE void lay_out(const struct job *job, size_t token, enum format format) {
    for (size_t index = 0; index < segments(job); index++) lay_out_segment(job, token, segment_of(job, index), format);
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

// The exact sums of 64 or 128 columns, 8 lanes, in steps.
INLINE __m256 exact_sums(const __m256i nibbles[4], const uint8_t *digits, size_t block_bytes, int blocks, int places) {
    const __m256i one = _mm256_set1_epi16(1), next_place = _mm256_set1_epi16(256);
    __m256i sum[3];
    for (int place = 0; place < places; place++) {
        for (int i = 0; i < 2 * blocks; i++) {
            const __m256i *at = (const __m256i *)(digits + (i / 2) * block_bytes + place * 64) + i % 2;
            __m256i pairs = _mm256_maddubs_epi16(nibbles[i], _mm256_loadu_si256(at));
            sum[place] = i ? _mm256_add_epi16(sum[place], pairs) : pairs;
        }
    }
    __m256i all = _mm256_add_epi32(_mm256_madd_epi16(sum[0], next_place), _mm256_madd_epi16(sum[1], one));
    if (places == 3) all = _mm256_add_epi32(_mm256_slli_epi32(all, 8), _mm256_madd_epi16(sum[2], one));
    return _mm256_cvtepi32_ps(all);
}

// What is stored is larger than the weight by its zero, or by 8.
INLINE __m256 excess_of(const struct product *p, const struct weight *w, size_t row, size_t group, __m256 x_sum) {
    return _mm256_mul_ps(_mm256_set1_ps(w->zero ? w->zero[row * p->groups + group] : 8), x_sum);
}

// One token

// Where a thread is in its streams.
struct streams {
    size_t row[STREAMS];
    const char *nibbles[STREAMS];
    const float *scales[STREAMS];
    __m256 totals[STREAMS];
};

INLINE void stream_segment(const struct job *job, const struct weight *w, struct streams *s, struct segment segment,
                           int blocks, int places) {
    const uint8_t *digits = job->digits + segment.column * places;
    const __m256 x_sum = _mm256_loadu_ps(job->x_sums + segment.index * 8);
    const __m256 step = _mm256_set1_ps(job->steps[segment.index]);
    const __m256 plain_excess = _mm256_mul_ps(_mm256_set1_ps(8), x_sum);
    for (int r = 0; r < STREAMS; r++) {
        const char *at = s->nibbles[r] + segment.column / 2;
        const float *scale = s->scales[r] + segment.group;
        __m256i nibbles[4];
        _mm_prefetch(at + BYTES_AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)scale + SCALE_BYTES_AHEAD, _MM_HINT_T0);
        // Else the compiler keeps an address for each load instead of one, most of them in memory.
        __asm__("" : "+r"(digits));
        for (int block = 0; block < blocks; block++) unpack(at + 32 * block, nibbles + 2 * block);
        __m256 sum = exact_sums(nibbles, digits, places * 64, blocks, places);
        __m256 excess = w->zero ? excess_of(job->product, w, s->row[r], segment.group, x_sum) : plain_excess;
        sum = _mm256_sub_ps(sum, excess);
        s->totals[r] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_broadcast_ss(scale), step), sum, s->totals[r]);
    }
}

INLINE void stream_row(const struct job *job, const struct weight *w, struct streams *s, int places) {
    for (size_t index = 0; index < segments(job); index++) {
        struct segment segment = segment_of(job, index);
        if (segment.blocks == 2) stream_segment(job, w, s, segment, 2, places);
        else stream_segment(job, w, s, segment, 1, places);
    }
}

static __m256 stream8(const struct job *job, const struct weight *w, size_t first, size_t apart) {
    const struct product *p = job->product;
    struct streams s;
    for (int r = 0; r < STREAMS; r++) {
        s.row[r] = smaller(first + r * apart, p->n - 1);
        s.nibbles[r] = (const char *)w->rows + s.row[r] * job->width / 2;
        s.scales[r] = w->scale + s.row[r] * p->groups;
        s.totals[r] = _mm256_setzero_ps();
    }
    if (job->places == 2) stream_row(job, w, &s, 2);
    else stream_row(job, w, &s, 3);
    return sum_each(s.totals);
}

static void stream_piece(void *data, size_t piece, int thread) {
    (void)thread;
    const struct job *job = data;
    const struct product *p = job->product;
    const size_t apart = job->rows_of_stream, first = piece * STREAMS * apart;
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
        __m256 branch = _mm256_loadu_ps(branches[0] + row - first), gate = _mm256_loadu_ps(branches[1] + row - first);
        put(p, job->first_token, row, end - row, finished(p, row, end - row, branch, gate));
    }
}

// Several tokens

struct panel {
    float totals[ROWS_OF_PANEL][MOST_TOKENS][8];
    float branches[2][MOST_TOKENS][ROWS_OF_PANEL];
};

INLINE void add_segment(const struct job *job, const struct weight *w, size_t first, struct segment segment, int blocks,
                        int places, struct panel *panel) {
    const struct product *p = job->product;
    const size_t block_bytes = job->tokens * places * 64, count = segments(job);
    const uint8_t *digits = job->digits + segment.column / 64 * block_bytes;
    for (size_t r = 0; r < ROWS_OF_PANEL; r++) {
        const size_t row = smaller(first + r, p->n - 1);
        const char *at = (const char *)w->rows + (row * job->width + segment.column) / 2;
        const __m256 scale = _mm256_broadcast_ss(w->scale + row * p->groups + segment.group);
        __m256i nibbles[4];
        for (int block = 0; block < blocks; block++) unpack(at + 32 * block, nibbles + 2 * block);
        for (size_t token = 0; token < job->tokens; token++) {
            const __m256 x_sum = _mm256_loadu_ps(job->x_sums + (token * count + segment.index) * 8);
            const __m256 step = _mm256_broadcast_ss(job->steps + token * count + segment.index);
            float *total = panel->totals[r][token];
            __m256 sum = exact_sums(nibbles, digits + token * places * 64, block_bytes, blocks, places);
            sum = _mm256_sub_ps(sum, excess_of(p, w, row, segment.group, x_sum));
            __m256 before = segment.index ? _mm256_load_ps(total) : _mm256_setzero_ps();
            _mm256_store_ps(total, _mm256_fmadd_ps(_mm256_mul_ps(scale, step), sum, before));
        }
    }
}

INLINE void add_segments(const struct job *job, const struct weight *w, size_t first, int places, struct panel *panel) {
    for (size_t index = 0; index < segments(job); index++) {
        struct segment segment = segment_of(job, index);
        if (segment.blocks == 2) add_segment(job, w, first, segment, 2, places, panel);
        else add_segment(job, w, first, segment, 1, places, panel);
    }
}

static void multiply_panel(void *data, size_t piece, int thread) {
    const struct job *job = data;
    const struct product *p = job->product;
    struct panel *panel = pool_scratch(thread, sizeof(struct panel));
    const size_t first = piece * ROWS_OF_PANEL, end = smaller(first + ROWS_OF_PANEL, p->n);
    for (int branch = 0; branch < (p->gate.rows ? 2 : 1); branch++) {
        const struct weight *w = branch ? &p->gate : &p->weight;
        if (job->places == 2) add_segments(job, w, first, 2, panel);
        else add_segments(job, w, first, 3, panel);
        for (size_t token = 0; token < job->tokens; token++) {
            for (size_t r = 0; r < ROWS_OF_PANEL; r++) {
                panel->branches[branch][token][r] = sum8(_mm256_load_ps(panel->totals[r][token]));
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
    job.segments_of_group = (product->padded + SEGMENT - 1) / SEGMENT;
    job.places = product->x_format == FLOAT32 ? 3 : 2;
    const size_t together = smaller(product->tokens, MOST_TOKENS), steps = together * segments(&job);
    const size_t digit_bytes = together * job.width * job.places;
    job.digits = pool_scratch(-1, digit_bytes + steps * 9 * sizeof(float));
    if (!job.digits) return -1;
    for (int thread = 0; together > 1 && thread < pool_threads(); thread++) {
        if (!pool_scratch(thread, sizeof(struct panel))) return -1;
    }
    job.x_sums = (float *)(job.digits + digit_bytes);
    job.steps = job.x_sums + steps * 8;
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
