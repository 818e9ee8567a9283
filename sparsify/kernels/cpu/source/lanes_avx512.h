// The operations of rows.h on AVX-512 (F, BW, DQ, VL): 16 lanes, which are 8 rows.

#pragma once

#include <immintrin.h>

#include "lanes_plain.h"

namespace {

struct Avx512 {
    static constexpr int WIDTH = 16, WIDEST = 16;

    static constexpr float INT4_UNIT = 1.0f;

    using F = __m512;

    using I = __m512i;

    static F all(float value) { return _mm512_set1_ps(value); }

    static F load(const float *p) { return _mm512_loadu_ps(p); }

    static I load_int(const uint8_t *p) { return _mm512_loadu_si512(p); }

    static F load_group(const float *p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }

    static F pick(F inputs, I meta) { return _mm512_permutevar_ps(inputs, meta); }

    static I shift_right_2(I i) { return _mm512_srli_epi32(i, 2); }

    // Turned rather than shifted: a table is asked by the lowest four bits.
    static I shift_left_4(I i) { return _mm512_rol_epi32(i, 4); }

    static I either(I a, I b) { return _mm512_or_si512(a, b); }

    static uint64_t first(I i) { return (uint32_t)_mm_cvtsi128_si32(_mm512_castsi512_si128(i)); }

    static F add(F a, F b) { return _mm512_add_ps(a, b); }

    static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }

    static F multiply_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

    static F lower_bfloat16(I i) { return _mm512_castsi512_ps(_mm512_slli_epi32(i, 16)); }

    static F upper_bfloat16(I i) {
        return _mm512_castsi512_ps(_mm512_and_si512(i, _mm512_set1_epi32(0xffff0000)));
    }

    static F load_half(const uint8_t *p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
    }

    static F load_int8(const uint8_t *p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
    }

    static F load_float8(const uint8_t *p) {
        const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
        const __m256i mask = _mm256_set1_epi16((short)0xbfff);
        return _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(wide, 7), mask));
    }

    static F top_int4(I i) {
        const F table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
        return _mm512_permutexvar_ps(_mm512_rol_epi32(i, 4), table);
    }

    static F top_nf4(I i) {
        return _mm512_permutexvar_ps(_mm512_rol_epi32(i, 4), _mm512_loadu_ps(NF4_VALUES));
    }

    static F subtract_zero(F values, F zero, bool is_int4) {
        return _mm512_sub_ps(values, is_int4 ? _mm512_sub_ps(zero, all(8.0f)) : zero);
    }

    static F spread(F eight) {  // 0 0 1 1 ... 7 7
        const I order = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        return _mm512_permutexvar_ps(order, eight);
    }

    static F pairs(const float *p) { return spread(_mm512_castps256_ps512(_mm256_loadu_ps(p))); }

    static F half_pairs(const uint16_t *p) {
        const __m256 eight = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
        return spread(_mm512_castps256_ps512(eight));
    }

    static F byte_pairs(const uint8_t *p) {
        const __m256i eight = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
        return spread(_mm512_castps256_ps512(_mm256_cvtepi32_ps(eight)));
    }

    static void store_pair_sums(F f, float *p) {
        const F pair = _mm512_add_ps(f, _mm512_permute_ps(f, 0xb1));
        const I order = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm256_storeu_ps(p, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, pair)));
    }
};

}  // namespace
