// The product of one block of 8 rows, written once over the vectors of an instruction set.
//
// `V` has the types F (V::WIDTH floats) and I (as many 32-bit integers), and the operations that
// lanes_plain.h spells out. Everything is in an unnamed namespace: each path is compiled with flags
// of its own, and the linker must not swap one's functions for another's.

#pragma once

#include "job.h"

// Loops over registers. Plain C++ keeps them: unrolled, they take compilers minutes.
#define UNROLL_(words) _Pragma(#words)
#ifdef KEEP_LOOPS
#define UNROLL(times)
#elif defined(__clang__)
#define UNROLL(times) UNROLL_(clang loop unroll_count(times))
#else
#define UNROLL(times) UNROLL_(GCC unroll times)
#endif

namespace {

// Where the scales and zeros of a group begin; padding of the columns belongs to the last group.
inline int64_t group_at(const Linear &job, int64_t block, int64_t lane, int64_t group) {
    const int64_t last = job.num_groups - 1;
    return (block * job.num_groups + (group < last ? group : last)) * ROWS + lane / 2;
}

template <class V, int TYPE>
inline typename V::F scales_of(const Linear &job, int64_t block, int64_t lane, int64_t group) {
    const int64_t at = group_at(job, block, lane, group);
    if constexpr (TYPE == FLOAT8)
        return V::pairs((const float *)job.scales + at);
    else
        return V::half_pairs((const uint16_t *)job.scales + at);
}

template <class V>
inline typename V::F zeros_of(const Linear &job, int64_t block, int64_t lane, int64_t group) {
    return V::byte_pairs(job.zeros + group_at(job, block, lane, group));
}

// The values of one step, before scales. `codes` carries what several steps share.
template <class V, int TYPE>
inline typename V::F value(const uint8_t *segment, int64_t lane, int step, typename V::I &codes) {
    if constexpr (TYPE == FLOAT32)
        return V::load((const float *)segment + step * LANES + lane);
    if constexpr (TYPE == BFLOAT16) {  // a step in the lower halves, the next in the upper ones
        if (step % 2 == 0) {
            codes = V::load_int(segment + (step / 2 * LANES + lane) * 4);
            return V::lower_bfloat16(codes);
        }
        return V::upper_bfloat16(codes);
    }
    if constexpr (TYPE == FLOAT16)
        return V::load_half(segment + (step * LANES + lane) * 2);
    if constexpr (TYPE == INT8)
        return V::load_int8(segment + step * LANES + lane);
    if constexpr (TYPE == FLOAT8)
        return V::load_float8(segment + step * LANES + lane);
    if constexpr (TYPE == INT4 || TYPE == NF4) {  // eight steps, the first in the highest bits
        if (step == 0)
            codes = V::load_int(segment + lane * 4);
        const typename V::F values = TYPE == INT4 ? V::top_int4(codes) : V::top_nf4(codes);
        codes = V::shift_left_4(codes);
        return values;
    }
}

// What `value` leaves to multiply with.
template <class V, int TYPE>
constexpr float unit() {
    return TYPE == FLOAT8 ? 256.0f : TYPE == INT4 ? V::INT4_UNIT : 1.0f;
}

template <class V, int A>
inline typename V::F sum_up(const typename V::F *sums) {
    if constexpr (A == 4)
        return V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3]));
    else if constexpr (A == 2)
        return V::add(sums[0], sums[1]);
    else
        return sums[0];
}

// Sums of `N` tokens for H * V::WIDTH lanes from `lane`, into sums[token][row].
//
// With scales per group, few tokens have their sums scaled once a group, and for many the values
// are scaled before the products (exact in float32 but for NF4). A token has more than one sum,
// where else each product had to wait for the one before it.
template <class V, int TYPE, bool HAS_ZEROS, bool SCALE_VALUES, int N, int H>
inline void run_lanes(
    const Linear &job, int64_t block, int64_t lane, const float *x, float *sums
) {
    using F = typename V::F;
    using I = typename V::I;
    constexpr bool HAS_GROUPS = TYPE == INT8 || TYPE == INT4 || TYPE == NF4;
    constexpr bool SCALE_SUMS = HAS_GROUPS && !SCALE_VALUES;
    constexpr int A = N * H == 1 ? 4 : N * H == 2 ? 2 : 1;
    const F factor = V::all(unit<V, TYPE>());
    F sum[H][N][A], total[H][N], scale[H], zero[H];
    I meta[H], codes[H];
    for (int h = 0; h < H; h++) {
        scale[h] = zero[h] = V::all(0.0f);
        codes[h] = V::load_int(job.blocks);  // `value` writes it first; compilers do not see that
        for (int n = 0; n < N; n++) {
            total[h][n] = V::all(0.0f);
            for (int a = 0; a < A; a++)
                sum[h][n][a] = V::all(0.0f);
        }
    }
    const uint8_t *at = job.blocks + block * job.num_chunks * chunk_bytes(TYPE);
    int64_t group = -1, left = 1;  // steps of the group that are left, this one included
    for (int64_t chunk = 0; chunk < job.num_chunks; chunk++, at += chunk_bytes(TYPE)) {
        for (int64_t line = 0; line < chunk_bytes(TYPE); line += 64)
            __builtin_prefetch(at + PREFETCH_BYTES + line);
        for (int h = 0; h < H; h++)
            meta[h] = V::load_int(at + (lane + h * V::WIDTH) * 4);
        const uint8_t *segment = at + META_BYTES;
        for (int half = 0; half < 2; half++, segment += segment_bytes(TYPE)) {
            if (SCALE_SUMS && (left -= SEGMENT) <= 0) {
                for (int h = 0; h < H; h++) {
                    if (group >= 0)
                        for (int n = 0; n < N; n++) {
                            const F whole = sum_up<V, A>(sum[h][n]);
                            total[h][n] = V::multiply_add(whole, scale[h], total[h][n]);
                            for (int a = 0; a < A; a++)
                                sum[h][n][a] = V::all(0.0f);
                        }
                    scale[h] = V::multiply(scales_of<V, TYPE>(job, block, lane + h * V::WIDTH, group + 1), factor);
                    if (HAS_ZEROS)
                        zero[h] = zeros_of<V>(job, block, lane + h * V::WIDTH, group + 1);
                }
                group++;
                left = job.group_steps;
            }
            UNROLL(8)
            for (int step = 0; step < SEGMENT; step++, x += N * 4) {
                F values[H];
                if (SCALE_VALUES && --left <= 0) {
                    group++;
                    left = job.group_steps;
                    for (int h = 0; h < H; h++) {
                        scale[h] = V::multiply(scales_of<V, TYPE>(job, block, lane + h * V::WIDTH, group), factor);
                        if (HAS_ZEROS)
                            zero[h] = zeros_of<V>(job, block, lane + h * V::WIDTH, group);
                    }
                }
                for (int h = 0; h < H; h++) {
                    values[h] = value<V, TYPE>(segment, lane + h * V::WIDTH, step, codes[h]);
                    if (HAS_ZEROS)
                        values[h] = V::subtract_zero(values[h], zero[h], TYPE == INT4);
                    if (SCALE_VALUES)
                        values[h] = V::multiply(values[h], scale[h]);
                }
                UNROLL(16)
                for (int n = 0; n < N; n++) {
                    const F inputs = V::load_group(x + n * 4);
                    for (int h = 0; h < H; h++)
                        sum[h][n][step % A] = V::multiply_add(
                            V::pick(inputs, meta[h]), values[h], sum[h][n][step % A]
                        );
                }
                for (int h = 0; h < H; h++)
                    meta[h] = V::shift_right_2(meta[h]);
            }
        }
    }
    for (int h = 0; h < H; h++) {
        if (!HAS_GROUPS)
            scale[h] = job.scales ? V::multiply(scales_of<V, TYPE>(job, block, lane + h * V::WIDTH, 0), factor) : factor;
        for (int n = 0; n < N; n++) {
            F whole = sum_up<V, A>(sum[h][n]);
            if (!SCALE_VALUES)
                whole = V::multiply_add(whole, scale[h], total[h][n]);
            V::store_pair_sums(whole, sums + n * ROWS + (lane + h * V::WIDTH) / 2);
        }
    }
}

template <class V, int TYPE, bool HAS_ZEROS, bool SCALE_VALUES, int N>
void run_width(const Linear &job, int64_t block, const float *x, float *sums) {
    constexpr int H = V::WIDTH < LANES && N <= 2 ? LANES / V::WIDTH : 1;
    for (int64_t lane = 0; lane < LANES; lane += H * V::WIDTH)
        run_lanes<V, TYPE, HAS_ZEROS, SCALE_VALUES, N, H>(job, block, lane, x, sums);
}

template <class V, int TYPE, bool HAS_ZEROS>
void run_type(const Linear &job, int64_t block, const float *x, int width, float *sums) {
    constexpr bool HAS_GROUPS = TYPE == INT8 || TYPE == INT4 || TYPE == NF4;
    switch (width) {
        case 1: return run_width<V, TYPE, HAS_ZEROS, false, 1>(job, block, x, sums);
        case 2: return run_width<V, TYPE, HAS_ZEROS, false, 2>(job, block, x, sums);
        case 4: return run_width<V, TYPE, HAS_ZEROS, false, 4>(job, block, x, sums);
        case 8: return run_width<V, TYPE, HAS_ZEROS, HAS_GROUPS, 8>(job, block, x, sums);
        default:
            if constexpr (V::WIDEST == 16)
                return run_width<V, TYPE, HAS_ZEROS, HAS_GROUPS, 16>(job, block, x, sums);
    }
}

template <class V>
void run_block(const Linear &job, int64_t block, const float *x, int width, float *sums) {
    const bool has_zeros = job.zeros != nullptr;
    switch (job.type) {
        case FLOAT32: return run_type<V, FLOAT32, false>(job, block, x, width, sums);
        case BFLOAT16: return run_type<V, BFLOAT16, false>(job, block, x, width, sums);
        case FLOAT16: return run_type<V, FLOAT16, false>(job, block, x, width, sums);
        case FLOAT8: return run_type<V, FLOAT8, false>(job, block, x, width, sums);
        case NF4: return run_type<V, NF4, false>(job, block, x, width, sums);
        case INT8:
            return has_zeros ? run_type<V, INT8, true>(job, block, x, width, sums)
                             : run_type<V, INT8, false>(job, block, x, width, sums);
        default:
            return has_zeros ? run_type<V, INT4, true>(job, block, x, width, sums)
                             : run_type<V, INT4, false>(job, block, x, width, sums);
    }
}

// All bytes are read and nothing else is done: what the memory gives. `num_bytes` in steps of 512.
template <class V>
uint64_t read_bytes(const uint8_t *begin, int64_t num_bytes) {
    constexpr int64_t STEP = V::WIDTH * 4, SUMS = 512 / STEP;
    typename V::I sums[SUMS];
    for (int64_t k = 0; k < SUMS; k++)
        sums[k] = V::load_int(begin + k * STEP);
    for (const uint8_t *at = begin; at < begin + num_bytes; at += 512) {
        for (int64_t line = 0; line < 512; line += 64)
            __builtin_prefetch(at + PREFETCH_BYTES + line);
        UNROLL(16)
        for (int64_t k = 0; k < SUMS; k++)
            sums[k] = V::either(sums[k], V::load_int(at + k * STEP));
    }
    for (int64_t k = 1; k < SUMS; k++)
        sums[0] = V::either(sums[0], sums[k]);
    return V::first(sums[0]);
}

// R rows of a dense bfloat16 weight times N tokens. Two columns come in 32 bits, as two vectors.
template <class V, int R, int N>
inline void dense_rows(const Dense &job, const uint16_t *weight, const float *x, float *sums) {
    using F = typename V::F;
    constexpr int64_t STEP = 2 * V::WIDTH;
    const int64_t columns = job.num_columns;
    F even[R][N], odd[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++)
            even[r][n] = odd[r][n] = V::all(0.0f);
    for (int64_t column = 0; column < columns; column += STEP)
        for (int r = 0; r < R; r++) {
            const uint8_t *at = (const uint8_t *)(weight + r * columns + column);
            __builtin_prefetch(at + PREFETCH_BYTES);
            const typename V::I both = V::load_int(at);
            const F low = V::lower_bfloat16(both), high = V::upper_bfloat16(both);
            for (int n = 0; n < N; n++) {
                const float *inputs = x + n * columns + column;
                even[r][n] = V::multiply_add(low, V::load(inputs), even[r][n]);
                odd[r][n] = V::multiply_add(high, V::load(inputs + V::WIDTH), odd[r][n]);
            }
        }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            float pairs[V::WIDTH / 2], sum = 0.0f;
            V::store_pair_sums(V::add(even[r][n], odd[r][n]), pairs);
            for (int k = 0; k < V::WIDTH / 2; k++)
                sum += pairs[k];
            sums[n * ROWS + r] = sum;
        }
}

template <class V, int N>
inline void dense_width(
    const Dense &job, const uint16_t *weight, int num_rows, const float *x, float *sums
) {
    // Rows at once: as many sums as there are registers, none of which waits for another.
    constexpr int R = N == 1 ? 4 : N == 2 || V::WIDEST == 16 ? 2 : 1;
    int row = 0;
    for (; row + R <= num_rows; row += R)
        dense_rows<V, R, N>(job, weight + row * job.num_columns, x, sums + row);
    for (; row < num_rows; row++)
        dense_rows<V, 1, N>(job, weight + row * job.num_columns, x, sums + row);
}

template <class V>
void run_dense(
    const Dense &job, const uint16_t *weight, int num_rows, const float *x, float *sums
) {
    switch (job.num_tokens) {
        case 1: return dense_width<V, 1>(job, weight, num_rows, x, sums);
        case 2: return dense_width<V, 2>(job, weight, num_rows, x, sums);
        case 3: return dense_width<V, 3>(job, weight, num_rows, x, sums);
        default: return dense_width<V, 4>(job, weight, num_rows, x, sums);
    }
}

}  // namespace
