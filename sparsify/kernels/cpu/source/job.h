// What one call computes. Plain C: ctypes fills `Linear` (sparsify/kernels/cpu/library.py).
//
// y[n][o] = sum over i of weight[o][i] * x[n][i] + bias[o], the weight 2:4 sparse in the layout of
// sparsify/kernels/cpu/layout.py: blocks of 8 rows, each in chunks of 64 columns, which are 16
// steps of one group of 4 columns. The 16 lanes of a step are 8 rows times 2 survivors.

#pragma once

#include <cstdint>

extern "C" {

enum Type { FLOAT32, BFLOAT16, FLOAT16, INT8, FLOAT8, INT4, NF4 };

struct Linear {
    const void *x;           // float32 or bfloat16 [num_tokens][x_stride], x_stride in elements
    void *y;                 // as x, [num_tokens][num_rows]
    const uint8_t *blocks;   // [num_blocks][num_chunks][chunk_bytes]
    const void *scales;      // float16 [num_blocks][num_groups][8], FLOAT8: float32; may be null
    const uint8_t *zeros;    // [num_blocks][num_groups][8]; may be null
    const float *bias;       // [num_rows]; may be null
    float *scratch;          // num_tokens rounded up to 8, times num_chunks * 64 floats
    int64_t num_tokens, num_rows, num_columns, x_stride;
    int64_t num_chunks, num_groups, group_steps;  // a group of scales is group_steps steps
    int32_t type, is_bfloat16, num_threads, path;
};

struct Dense {
    const uint16_t *x;       // bfloat16 [num_tokens][x_stride], x_stride in elements
    uint16_t *y;             // bfloat16 [num_tokens][num_rows]
    const uint16_t *weight;  // bfloat16 [num_rows][num_columns]
    const float *bias;       // [num_rows]; may be null
    float *scratch;          // num_tokens times num_columns floats
    int64_t num_tokens, num_rows, num_columns, x_stride;  // tokens: 1 to 4; columns: 32 times some
    int32_t num_threads, path;
};

}  // extern "C"

constexpr int ROWS = 8, LANES = 16, STEPS = 16, COLUMNS = 64, SEGMENT = 8;  // SEGMENT: of steps

constexpr int64_t PREFETCH_BYTES = 2048;  // ahead of what is read: hardware stops at each page

constexpr int64_t META_BYTES = 64;  // of a chunk: 16 lanes of 16 positions of 2 bits

constexpr int64_t segment_bytes(int type) {
    return SEGMENT * LANES * (type == FLOAT32 ? 8 : type <= FLOAT16 ? 4 : type >= INT4 ? 1 : 2) / 2;
}

constexpr int64_t chunk_bytes(int type) { return META_BYTES + 2 * segment_bytes(type); }

// Some blocks times some tokens, on one processor's instructions. `x` is [num_chunks * 16 groups]
// [width][4], `sums` [width][8 rows]; `width` is 1, 2, 4, 8 or 16, at most the path's widest.
using RunBlock = void (*)(const Linear &, int64_t block, const float *x, int width, float *sums);

using ReadBytes = uint64_t (*)(const uint8_t *begin, int64_t num_bytes);

// `num_rows` (at most ROWS) rows of a dense weight times the tokens; `x` is [num_tokens][columns]
// with each 2 * width columns sorted into even and odd ones, `sums` [num_tokens][ROWS].
using RunDense = void (*)(
    const Dense &, const uint16_t *weight, int num_rows, const float *x, float *sums
);

struct Path {
    RunBlock run;
    ReadBytes read;
    RunDense dense;
    int width;   // lanes of a vector
    int widest;  // tokens at once
};

extern const Path PLAIN_PATH, AVX2_PATH, AVX512_PATH;
