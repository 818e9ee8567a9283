// The library's face: which paths there are, linear layers on several threads, and a loop that
// only reads. A row is computed by one thread in one order, so the number of threads changes no bit.

#include <cstring>

#include "job.h"

namespace {

constexpr int64_t GROUP_BYTES = 256 * 1024;  // of blocks that stay in cache while tokens pass

const Path *path_of(int which) {
#if defined(__x86_64__)
    if (which == 2)
        return &AVX512_PATH;
    if (which == 1)
        return &AVX2_PATH;
#endif
    return &PLAIN_PATH;
}

float as_float(uint16_t bfloat16) {
    const uint32_t bits = (uint32_t)bfloat16 << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

uint16_t as_bfloat16(float value) {  // to the nearest, of two the even one
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Tokens at once for the `left` ones: a power of two, which may be more than there are.
int width_for(const Linear &job, int64_t left, int widest) {
    const bool has_groups = job.type == INT8 || job.type >= INT4;
    // Scales that change within a segment are applied to values, which few tokens have no code for.
    int width = has_groups && job.group_steps % SEGMENT && job.num_groups > 1 ? 8 : 1;
    while (width < left && width < widest)
        width *= 2;
    // Of 9 to 12 tokens, 8 and then the rest are less work than 16.
    return width == 16 && left <= 12 ? 8 : width;
}

// Inputs of `width` tokens from `first`, group by group; tokens and columns that are not there are 0.
void gather(const Linear &job, int64_t first, int width, float *to) {
    const int64_t padded = job.num_chunks * COLUMNS;
    for (int n = 0; n < width; n++) {
        const int64_t token = first + n;
        float *out = to + n * 4;
        const int64_t row = token * job.x_stride;
        for (int64_t column = 0; column < padded; column += 4, out += width * 4) {
            if (token >= job.num_tokens || column >= job.num_columns)
                std::memset(out, 0, 16);
            else if (job.is_bfloat16)
                for (int k = 0; k < 4; k++)
                    out[k] = as_float(((const uint16_t *)job.x)[row + column + k]);
            else
                std::memcpy(out, (const float *)job.x + row + column, 16);
        }
    }
}

void scatter(const Linear &job, int64_t block, int64_t first, int width, const float *sums) {
    for (int n = 0; n < width && first + n < job.num_tokens; n++)
        for (int64_t k = 0; k < ROWS && block * ROWS + k < job.num_rows; k++) {
            const int64_t row = block * ROWS + k, at = (first + n) * job.num_rows + row;
            const float value = sums[n * ROWS + k] + (job.bias ? job.bias[row] : 0.0f);
            if (job.is_bfloat16)
                ((uint16_t *)job.y)[at] = as_bfloat16(value);
            else
                ((float *)job.y)[at] = value;
        }
}

void run_blocks(const Linear &job, const Path &path, int64_t begin, int64_t end) {
    const int64_t bytes = job.num_chunks * chunk_bytes(job.type);
    const int64_t step = bytes < GROUP_BYTES ? GROUP_BYTES / bytes : 1;
    float sums[16 * ROWS];
    for (int64_t group = begin; group < end; group += step) {
        const float *x = job.scratch;
        int width;
        for (int64_t first = 0; first < job.num_tokens; first += width) {
            width = width_for(job, job.num_tokens - first, path.widest);
            for (int64_t block = group; block < group + step && block < end; block++) {
                path.run(job, block, x, width, sums);
                scatter(job, block, first, width, sums);
            }
            x += width * job.num_chunks * COLUMNS;
        }
    }
}

// The blocks of rows of a layer in one stretch a thread: `work(begin, end)` for each.
template <class Job, class Work>
void share_blocks(const Job &job, Work work) {
    const int64_t num_blocks = (job.num_rows + ROWS - 1) / ROWS;
    const int64_t num_parts = job.num_threads < num_blocks ? job.num_threads : num_blocks;
#ifdef _OPENMP
#pragma omp parallel for num_threads((int)num_parts) schedule(static, 1) if (num_parts > 1)
#endif
    for (int64_t part = 0; part < num_parts; part++)
        work(part * num_blocks / num_parts, (part + 1) * num_blocks / num_parts);
}

}  // namespace

extern "C" {

// The best path of this processor: 0 plain, 1 AVX2, 2 AVX-512.
int twofour_best_path() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return 1;
#endif
    return 0;
}

int twofour_has_threads() {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

void twofour_linear(const Linear *given) {
    const Linear &job = *given;
    const Path &path = *path_of(job.path);
    float *x = job.scratch;
    int width;
    for (int64_t first = 0; first < job.num_tokens; first += width) {
        width = width_for(job, job.num_tokens - first, path.widest);
        gather(job, first, width, x);
        x += width * job.num_chunks * COLUMNS;
    }
    share_blocks(job, [&](int64_t begin, int64_t end) { run_blocks(job, path, begin, end); });
}

// At most 4 tokens: with more of them a dense weight is better read by torch's own products.
void twofour_dense(const Dense *given) {
    const Dense &job = *given;
    const Path &path = *path_of(job.path);
    const int64_t step = 2 * path.width;
    for (int64_t token = 0; token < job.num_tokens; token++)
        for (int64_t column = 0; column < job.num_columns; column++) {
            const int64_t from = token * job.x_stride + column, place = column % step;
            const int64_t to = column - place + place % 2 * path.width + place / 2;
            job.scratch[token * job.num_columns + to] = as_float(job.x[from]);
        }
    share_blocks(job, [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; block++) {
            const int64_t first = block * ROWS, left = job.num_rows - first;
            float sums[4 * ROWS];
            path.dense(
                job, job.weight + first * job.num_columns, (int)(left < ROWS ? left : ROWS),
                job.scratch, sums
            );
            for (int64_t token = 0; token < job.num_tokens; token++)
                for (int64_t k = 0; k < ROWS && k < left; k++)
                    job.y[token * job.num_rows + first + k] = as_bfloat16(
                        sums[token * ROWS + k] + (job.bias ? job.bias[first + k] : 0.0f)
                    );
        }
    });
}

// A number that depends on every byte. `num_bytes` is a multiple of 512 for each thread.
uint64_t twofour_read(const uint8_t *begin, int64_t num_bytes, int num_threads, int path) {
    const int64_t lines = num_bytes / 512;
    uint64_t result = 0;
#ifdef _OPENMP
#pragma omp parallel for num_threads(num_threads) schedule(static, 1) reduction(| : result)
#endif
    for (int part = 0; part < num_threads; part++) {
        const int64_t first = part * lines / num_threads, last = (part + 1) * lines / num_threads;
        if (first < last)
            result |= path_of(path)->read(begin + first * 512, (last - first) * 512);
    }
    return result;
}

}  // extern "C"
