// A piece is one sequence and one key/value head: its key and value go into the pool, then the query heads that share
// them look at all of its tokens. Sums run over tokens in their order, so neither the batch nor the threads change a bit.
#include "attention.h"

#include <math.h>

#include "pool.h"
#include "vec.h"

#define TOKENS_AT_ONCE 8

struct job {
    const struct decodes *d;
    size_t width;       // head_size, rounded up to 8
    size_t longest;     // sequence, rounded up to 8
    float *turns;       // [sequences, 2, rotary_dim / 2]: cosines, sines
};

INLINE float load1(const void *memory, size_t index, int format) {
    switch (format) {
    case FLOAT32: return ((const float *)memory)[index];
    case FLOAT16: return _cvtsh_ss(((const uint16_t *)memory)[index]);
    default: {
        uint32_t bits = (uint32_t)((const uint16_t *)memory)[index] << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
    }
}

INLINE __m256 load_as(const void *memory, size_t index, size_t count, int format) {
    switch (format) {
    case FLOAT32: return load_some(memory, index, count, FLOAT32);
    case FLOAT16: return load_some(memory, index, count, FLOAT16);
    case BFLOAT16: return load_some(memory, index, count, BFLOAT16);
    default: return load_some(memory, index, count, INT8);
    }
}

INLINE void store_as(void *memory, size_t index, size_t count, __m256 x, int format) {
    switch (format) {
    case FLOAT32: store_some(memory, index, count, x, FLOAT32); break;
    case FLOAT16: store_some(memory, index, count, x, FLOAT16); break;
    default: store_some(memory, index, count, x, BFLOAT16); break;
    }
}

// Qwen-1's stretch of the rotary base for a prompt beyond the trained length: 1, 3, 7...
static double ntk_alpha(size_t prompt, size_t trained) {
    size_t power = 1;
    while (prompt > power * trained) power *= 2;
    return (double)(2 * power - 1);
}

static void find_turns(void *data, size_t sequence, int thread) {
    (void)thread;
    const struct job *job = data;
    const struct decodes *d = job->d;
    const size_t half = d->rotary_dim / 2;
    float *cosines = job->turns + sequence * d->rotary_dim, *sines = cosines + half;
    double base = d->rotary_base, dim = (double)d->rotary_dim;
    if (d->ntk_length) base *= pow(ntk_alpha((size_t)d->prompts[sequence], d->ntk_length), dim / (dim - 2));
    const double step = pow(base, -2 / dim);
    double frequency = 1;
    for (size_t j = 0; j < half; j++, frequency *= step) {
        double angle = d->positions[sequence] * frequency;
        cosines[j] = (float)cos(angle);
        sines[j] = (float)sin(angle);
    }
}

// One head of qkv as floats, turned if it is a query or a key, times `scale`; zeros beyond head_size.
static void read_head(const struct job *job, size_t sequence, size_t head, int is_turned, float scale, float *vector) {
    const struct decodes *d = job->d;
    const size_t first = (sequence * (d->heads + 2 * d->kv_heads) + head) * d->head_size;
    for (size_t j = 0; j < d->head_size; j++) vector[j] = load1(d->qkv, first + j, d->format);
    for (size_t j = d->head_size; j < job->width; j++) vector[j] = 0;
    const size_t half = is_turned ? d->rotary_dim / 2 : 0;
    const float *cosines = job->turns + sequence * d->rotary_dim, *sines = cosines + d->rotary_dim / 2;
    for (size_t j = 0; j < half; j++) {
        float a = vector[j], b = vector[j + half];
        vector[j] = a * cosines[j] - b * sines[j];
        vector[j + half] = b * cosines[j] + a * sines[j];
    }
    for (size_t j = 0; j < job->width; j++) vector[j] *= scale;
}

// The row of the pool that holds a token's key (side 0) or value (side 1), counted in tokens.
static size_t pool_row(const struct decodes *d, size_t sequence, size_t token, size_t side, size_t kv_head) {
    size_t block = (size_t)d->block_tables[sequence * d->blocks_per_row + token / d->block_size];
    return ((block * 2 + side) * d->kv_heads + kv_head) * d->block_size + token % d->block_size;
}

static void write_token(const struct job *job, size_t row, const float *vector) {
    const struct decodes *d = job->d;
    if (d->pool_format != INT8) {
        for (size_t j = 0; j < d->head_size; j += 8) {
            store_as(d->pool, row * d->head_size + j, d->head_size - j, _mm256_loadu_ps(vector + j), d->pool_format);
        }
        return;
    }
    float largest = 0;
    for (size_t j = 0; j < d->head_size; j++) {
        if (fabsf(vector[j]) > largest || isnan(vector[j])) largest = fabsf(vector[j]);  // a NaN stays the largest
    }
    // As reference.quantize_per_token.
    float steps_per_unit = largest > 1e-30f ? 127 / largest : 0;
    for (size_t j = 0; j < d->head_size; j++) {
        float level = rintf(vector[j] * steps_per_unit);
        ((int8_t *)d->pool)[row * d->head_size + j] = level >= -127 && level <= 127 ? (int8_t)level : 0;
    }
    d->pool_scales[row] = largest / 127;
}

// `count` tokens' keys or values as floats [count, width].
static void read_tokens(const struct job *job, size_t sequence, size_t first, size_t count, size_t side, size_t kv_head,
                        float *vectors) {
    const struct decodes *d = job->d;
    for (size_t t = 0; t < count; t++, vectors += job->width) {
        size_t row = pool_row(d, sequence, first + t, side, kv_head);
        __m256 scale = _mm256_set1_ps(d->pool_format == INT8 ? d->pool_scales[row] : 1);
        for (size_t j = 0; j < d->head_size; j += 8) {
            __m256 x = load_as(d->pool, row * d->head_size + j, d->head_size - j, d->pool_format);
            _mm256_storeu_ps(vectors + j, d->pool_format == INT8 ? _mm256_mul_ps(x, scale) : x);
        }
    }
}

// e^(score - largest) in place, and the sum of all.
static float exponentials(float *scores, size_t count, float largest) {
    __m256 sum = _mm256_setzero_ps();
    for (size_t t = 0; t < count; t += 8) {
        __m256 e = exp8(_mm256_sub_ps(_mm256_loadu_ps(scores + t), _mm256_set1_ps(largest)));
        if (count - t < 8) {
            __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            __m256i is_token = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(count - t)), place);
            e = _mm256_and_ps(e, _mm256_castsi256_ps(is_token));
        }
        _mm256_storeu_ps(scores + t, e);
        sum = _mm256_add_ps(sum, e);
    }
    return sum8(sum);
}

static void attend_piece(void *data, size_t piece, int thread) {
    const struct job *job = data;
    const struct decodes *d = job->d;
    const size_t sequence = piece / d->kv_heads, kv_head = piece % d->kv_heads, width = job->width;
    const size_t group = d->heads / d->kv_heads, total = (size_t)d->lengths[sequence];
    float *queries = pool_scratch(thread, 0), *tokens = queries + group * width;
    float *sums = tokens + TOKENS_AT_ONCE * width, *scores = sums + group * width;

    const size_t position = (size_t)d->positions[sequence];
    read_head(job, sequence, d->heads + kv_head, 1, 1, tokens);
    write_token(job, pool_row(d, sequence, position, 0, kv_head), tokens);
    read_head(job, sequence, d->heads + d->kv_heads + kv_head, 0, 1, tokens);
    write_token(job, pool_row(d, sequence, position, 1, kv_head), tokens);

    double scale = d->score_scale;
    if (d->logn_length) scale *= fmax(1, log(position + 1.0) / log((double)d->logn_length));
    for (size_t q = 0; q < group; q++) {
        read_head(job, sequence, kv_head * group + q, 1, (float)scale, queries + q * width);
    }
    for (size_t first = 0; first < total; first += TOKENS_AT_ONCE) {
        size_t count = total - first < TOKENS_AT_ONCE ? total - first : TOKENS_AT_ONCE;
        read_tokens(job, sequence, first, count, 0, kv_head, tokens);
        for (size_t q = 0; q < group; q++) {
            __m256 dot[TOKENS_AT_ONCE];
            for (size_t t = 0; t < TOKENS_AT_ONCE; t++) dot[t] = _mm256_setzero_ps();
            for (size_t j = 0; j < width; j += 8) {
                __m256 query = _mm256_loadu_ps(queries + q * width + j);
                for (size_t t = 0; t < TOKENS_AT_ONCE; t++) {
                    dot[t] = _mm256_fmadd_ps(query, _mm256_loadu_ps(tokens + t * width + j), dot[t]);
                }
            }
            _mm256_storeu_ps(scores + q * job->longest + first, sum_each(dot));
        }
    }
    for (size_t q = 0; q < group; q++) {
        float *row = scores + q * job->longest;
        float largest = row[0];
        for (size_t t = 1; t < total; t++) {
            if (row[t] > largest) largest = row[t];  // a NaN comes back in the sum of exponentials
        }
        float sum = exponentials(row, total, largest);
        const __m256 share = _mm256_set1_ps(1 / sum);
        for (size_t t = 0; t < total; t += 8) _mm256_storeu_ps(row + t, _mm256_mul_ps(_mm256_loadu_ps(row + t), share));
    }
    memset(sums, 0, group * width * sizeof(float));
    for (size_t first = 0; first < total; first += TOKENS_AT_ONCE) {
        size_t count = total - first < TOKENS_AT_ONCE ? total - first : TOKENS_AT_ONCE;
        read_tokens(job, sequence, first, count, 1, kv_head, tokens);
        for (size_t q = 0; q < group; q++) {
            const float *row = scores + q * job->longest + first;
            for (size_t j = 0; j < width; j += 8) {
                __m256 sum = _mm256_loadu_ps(sums + q * width + j);
                for (size_t t = 0; t < count; t++) {
                    sum = _mm256_fmadd_ps(_mm256_set1_ps(row[t]), _mm256_loadu_ps(tokens + t * width + j), sum);
                }
                _mm256_storeu_ps(sums + q * width + j, sum);
            }
        }
    }
    for (size_t q = 0; q < group; q++) {
        size_t first = (sequence * d->heads + kv_head * group + q) * d->head_size;
        for (size_t j = 0; j < d->head_size; j += 8) {
            __m256 sum = _mm256_loadu_ps(sums + q * width + j);
            store_as(d->context, first + j, d->head_size - j, sum, d->format);
        }
    }
}

int attend(const struct decodes *d) {
    struct job job = {.d = d, .width = rounded_up(d->head_size, 8)};
    for (size_t s = 0; s < d->sequences; s++) {
        size_t length = rounded_up((size_t)d->lengths[s], TOKENS_AT_ONCE);
        if (length > job.longest) job.longest = length;
    }
    size_t group = d->heads / d->kv_heads;
    size_t floats = (2 * group + TOKENS_AT_ONCE) * job.width + group * job.longest;
    for (int thread = 0; thread < pool_threads(); thread++) {
        if (!pool_scratch(thread, floats * sizeof(float))) return -1;
    }
    job.turns = pool_scratch(-1, d->sequences * (d->rotary_dim + 1) * sizeof(float));
    if (!job.turns) return -1;
    pool_run(find_turns, &job, d->sequences);
    pool_run(attend_piece, &job, d->sequences * d->kv_heads);
    return 0;
}
