// The operations of rows.h in plain C++, for processors without a path of their own.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr float NF4_VALUES[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// float16 to float32, exact: a subnormal is its integer times 2^-24.
inline float half_as_float(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00)
        return bits_as<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude < 0x400)
        return (sign ? -1.0f : 1.0f) * (float)magnitude * 0x1p-24f;
    return bits_as<float>(sign | ((magnitude << 13) + (112u << 23)));
}

struct Plain {
    static constexpr int WIDTH = 16, WIDEST = 8;

    static constexpr float INT4_UNIT = 0x1p-28f;  // of what top_int4 gives

    struct F { float v[WIDTH]; };

    struct I { uint32_t v[WIDTH]; };

    template <class Each>
    static F fill(Each each) {
        F f;
        for (int k = 0; k < WIDTH; k++)
            f.v[k] = each(k);
        return f;
    }

    template <class Each>
    static I fill_int(Each each) {
        I i;
        for (int k = 0; k < WIDTH; k++)
            i.v[k] = each(k);
        return i;
    }

    static F all(float value) { return fill([=](int) { return value; }); }

    static F load(const float *p) { return fill([=](int k) { return p[k]; }); }

    static I load_int(const uint8_t *p) { I i; std::memcpy(i.v, p, sizeof i.v); return i; }

    // Four inputs, for every four lanes again.
    static F load_group(const float *p) { return fill([=](int k) { return p[k % 4]; }); }

    // Of each lane's four, the one that the lowest two bits name.
    static F pick(const F &inputs, const I &meta) {
        return fill([&](int k) { return inputs.v[k / 4 * 4 + (meta.v[k] & 3)]; });
    }

    static I shift_right_2(const I &i) { return fill_int([&](int k) { return i.v[k] >> 2; }); }

    static I shift_left_4(const I &i) { return fill_int([&](int k) { return i.v[k] << 4; }); }

    static I either(const I &a, const I &b) {
        return fill_int([&](int k) { return a.v[k] | b.v[k]; });
    }

    static uint64_t first(const I &i) { return i.v[0]; }

    static F add(const F &a, const F &b) { return fill([&](int k) { return a.v[k] + b.v[k]; }); }

    static F multiply(const F &a, const F &b) {
        return fill([&](int k) { return a.v[k] * b.v[k]; });
    }

    static F multiply_add(const F &a, const F &b, const F &c) {
        return fill([&](int k) { return a.v[k] * b.v[k] + c.v[k]; });
    }

    static F lower_bfloat16(const I &i) {
        return fill([&](int k) { return bits_as<float>(i.v[k] << 16); });
    }

    static F upper_bfloat16(const I &i) {
        return fill([&](int k) { return bits_as<float>(i.v[k] & 0xffff0000u); });
    }

    static F load_half(const uint8_t *p) {
        uint16_t halves[WIDTH];
        std::memcpy(halves, p, sizeof halves);
        return fill([&](int k) { return half_as_float(halves[k]); });
    }

    static F load_int8(const uint8_t *p) { return fill([=](int k) { return (float)(int8_t)p[k]; }); }

    // e4m3 over 256: as a float16 whose exponent has another bias.
    static F load_float8(const uint8_t *p) {
        return fill([=](int k) {
            return half_as_float((uint16_t)((p[k] & 0x80) << 8 | (p[k] & 0x7f) << 7));
        });
    }

    // The highest four bits as a signed number, over INT4_UNIT.
    static F top_int4(const I &i) {
        return fill([&](int k) { return (float)(int32_t)(i.v[k] & 0xf0000000u); });
    }

    static F top_nf4(const I &i) { return fill([&](int k) { return NF4_VALUES[i.v[k] >> 28]; }); }

    // Zeros of INT4 count from code 0 and the stored codes from 8; both over their unit.
    static F subtract_zero(const F &values, const F &zero, bool is_int4) {
        const float unit = is_int4 ? 1 / INT4_UNIT : 1.0f, offset = is_int4 ? 8.0f : 0.0f;
        return fill([&](int k) { return values.v[k] - (zero.v[k] - offset) * unit; });
    }

    // One number a row, for its two lanes.
    static F pairs(const float *p) { return fill([=](int k) { return p[k / 2]; }); }

    static F half_pairs(const uint16_t *p) {
        return fill([=](int k) { return half_as_float(p[k / 2]); });
    }

    static F byte_pairs(const uint8_t *p) { return fill([=](int k) { return (float)p[k / 2]; }); }

    static void store_pair_sums(const F &f, float *p) {
        for (int k = 0; k < WIDTH / 2; k++)
            p[k] = f.v[2 * k] + f.v[2 * k + 1];
    }
};

}  // namespace
