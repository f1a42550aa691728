// Eight floats at a time: loads that widen, stores that round, sums, exp. For processors with AVX2, FMA and F16C, which
// only the files that include this are compiled for.
#pragma once
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

// How numbers are stored; launch.py has the same table.
enum format { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, INT8 = 3, INT4 = 4 };

INLINE size_t bytes_of(enum format format) { return format == FLOAT32 ? 4 : format == INT8 ? 1 : 2; }

INLINE size_t rounded_up(size_t value, size_t step) { return (value + step - 1) / step * step; }

INLINE __m256 widen_bfloat16(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// Elements index .. index + 7, of any format but int4.
INLINE __m256 load8(const void *memory, size_t index, enum format format) {
    const char *at = (const char *)memory + index * bytes_of(format);
    switch (format) {
    case FLOAT32: return _mm256_loadu_ps((const float *)at);
    case FLOAT16: return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
    case BFLOAT16: return widen_bfloat16(_mm_loadu_si128((const __m128i *)at));
    default: return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at)));
    }
}

// Rounds to the nearest, ties to even; a NaN stays one.
INLINE __m128i narrow_bfloat16(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

INLINE void store8(void *memory, size_t index, __m256 x, enum format format) {
    char *at = (char *)memory + index * bytes_of(format);
    switch (format) {
    case FLOAT32: _mm256_storeu_ps((float *)at, x); break;
    case FLOAT16: _mm_storeu_si128((__m128i *)at, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); break;
    default: _mm_storeu_si128((__m128i *)at, narrow_bfloat16(x)); break;
    }
}

// The first `count` of eight elements; the others are zero, and are not touched in memory.
INLINE __m256 load_some(const void *memory, size_t index, size_t count, enum format format) {
    if (count >= 8) return load8(memory, index, format);
    char copy[32] = {0};
    memcpy(copy, (const char *)memory + index * bytes_of(format), count * bytes_of(format));
    return load8(copy, 0, format);
}

INLINE void store_some(void *memory, size_t index, size_t count, __m256 x, enum format format) {
    if (count >= 8) {
        store8(memory, index, x, format);
        return;
    }
    char copy[32];
    store8(copy, 0, x, format);
    memcpy((char *)memory + index * bytes_of(format), copy, count * bytes_of(format));
}

// Sums of eight vectors as the elements of one, each ((x0 + x1) + (x2 + x3)) + ((x4 + x5) + (x6 + x7)).
INLINE __m256 sum_each(const __m256 x[8]) {
    __m256 first = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
    __m256 second = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31));
}

// In the order of sum_each.
INLINE float sum8(__m256 x) {
    __m256 pairs = _mm256_hadd_ps(x, x), fours = _mm256_hadd_ps(pairs, pairs);
    return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
}

INLINE float max8(__m256 x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// e^x within 2 units in the last place: 2^n * e^r with |r| <= ln(2) / 2, e^r by its series. Beyond the range of normal
// floats it stays at the ends of that range. A NaN stays one.
INLINE __m256 exp8(__m256 x) {
    x = _mm256_max_ps(_mm256_set1_ps(-87.0f), _mm256_min_ps(_mm256_set1_ps(88.0f), x));
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    // ln(2) in two parts, the first with zeros at its end, so that n times it is exact.
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    static const float inverse_factorials[] = {1.f / 5040, 1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f};
    __m256 series = _mm256_set1_ps(inverse_factorials[0]);
    for (int term = 1; term < 8; term++) series = _mm256_fmadd_ps(series, r, _mm256_set1_ps(inverse_factorials[term]));
    __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(series, _mm256_castsi256_ps(exponent));
}

INLINE __m256 silu8(__m256 x) {
    __m256 minus_x = _mm256_xor_ps(x, _mm256_set1_ps(-0.0f));
    return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), exp8(minus_x)));
}
