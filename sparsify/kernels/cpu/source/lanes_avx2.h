// The operations of rows.h on AVX2, FMA and F16C: 8 lanes, which are 4 rows.

#pragma once

#include <immintrin.h>

#include "lanes_plain.h"

namespace {

struct Avx2 {
    static constexpr int WIDTH = 8, WIDEST = 8;

    static constexpr float INT4_UNIT = 0x1p-28f;

    using F = __m256;

    using I = __m256i;

    static F all(float value) { return _mm256_set1_ps(value); }

    static F load(const float *p) { return _mm256_loadu_ps(p); }

    static I load_int(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }

    static F load_group(const float *p) { return _mm256_broadcast_ps((const __m128 *)p); }

    static F pick(F inputs, I meta) { return _mm256_permutevar_ps(inputs, meta); }

    static I shift_right_2(I i) { return _mm256_srli_epi32(i, 2); }

    static I shift_left_4(I i) { return _mm256_slli_epi32(i, 4); }

    static I either(I a, I b) { return _mm256_or_si256(a, b); }

    static uint64_t first(I i) { return (uint32_t)_mm256_cvtsi256_si32(i); }

    static F add(F a, F b) { return _mm256_add_ps(a, b); }

    static F multiply(F a, F b) { return _mm256_mul_ps(a, b); }

    static F multiply_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

    static F lower_bfloat16(I i) { return _mm256_castsi256_ps(_mm256_slli_epi32(i, 16)); }

    static F upper_bfloat16(I i) {
        return _mm256_castsi256_ps(_mm256_and_si256(i, _mm256_set1_epi32(0xffff0000)));
    }

    static F load_half(const uint8_t *p) {
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
    }

    static F load_int8(const uint8_t *p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
    }

    static F load_float8(const uint8_t *p) {
        const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)p));
        const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16((short)0xbfff));
        return _mm256_cvtph_ps(half);
    }

    static F top_int4(I i) {
        return _mm256_cvtepi32_ps(_mm256_and_si256(i, _mm256_set1_epi32(0xf0000000)));
    }

    static F top_nf4(I i) {  // a permutation knows 3 of the 4 bits; the highest one chooses
        const I index = _mm256_srli_epi32(i, 28);
        const F low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(NF4_VALUES), index);
        const F high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(NF4_VALUES + 8), index);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(i));
    }

    static F subtract_zero(F values, F zero, bool is_int4) {
        if (!is_int4)
            return _mm256_sub_ps(values, zero);
        return _mm256_sub_ps(
            values, _mm256_mul_ps(_mm256_sub_ps(zero, all(8.0f)), all(1 / INT4_UNIT))
        );
    }

    static F spread(F four) {  // 0 0 1 1 2 2 3 3
        return _mm256_permutevar8x32_ps(four, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
    }

    static F pairs(const float *p) { return spread(_mm256_castps128_ps256(_mm_loadu_ps(p))); }

    static F half_pairs(const uint16_t *p) {
        return spread(_mm256_cvtph_ps(_mm_loadl_epi64((const __m128i *)p)));
    }

    static F byte_pairs(const uint8_t *p) {
        int32_t four;
        std::memcpy(&four, p, sizeof four);
        return spread(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi32_si128(four))));
    }

    static void store_pair_sums(F f, float *p) {
        const __m128 low = _mm256_castps256_ps128(f), high = _mm256_extractf128_ps(f, 1);
        _mm_storeu_ps(p, _mm_hadd_ps(low, high));
    }
};

}  // namespace
