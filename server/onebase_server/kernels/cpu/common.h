// Types and small helpers shared by the CPU kernels: sizes, bf16, exp, shares of work.
// Every reduction here has one fixed order, so that a row's result never depends on the batch around it.
#pragma once

#include <cstddef>

#include "lanes.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define ONEBASE_AMX 1
#endif

namespace onebase {

constexpr int BLOCK = 64;        // weights that share one absmax
constexpr int STRIP = 16;        // output features repacked together
constexpr int KEYS = 16;         // keys in a tile of the KV cache
constexpr int SPLIT = 64;        // keys an online softmax step takes, aligned to position 0
constexpr int BLOCK_BYTES = 64 + STRIP * BLOCK / 2;  // 16 absmax in fp32, then the nibbles

typedef uint16_t bf16;

inline float to_float(bf16 x) {
    uint32_t u = uint32_t(x) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline float to_float(float x) { return x; }

// Round to nearest even, as torch and the hardware do (NaN stays NaN: the top mantissa bits survive).
inline bf16 to_bf16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return bf16(u >> 16 | 0x40);
    return bf16((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
inline v16f round_bf16(v16f x) {
    v16u u = (v16u)x;
    u = (u + 0x7fffu + ((u >> 16) & 1)) & 0xffff0000u;
    return (v16f)u;
}

inline v16f load_wide(const float* p) { return load(p); }
inline v16f load_wide(const bf16* p) {
#if defined(__AVX512F__)
    return (v16f)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(ONEBASE_PAIRS)
    const __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    const __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8)));
    return {(v8f)_mm256_slli_epi32(low, 16), (v8f)_mm256_slli_epi32(high, 16)};
#else
    v16u u;
    for (int i = 0; i < LANES; i++) u[i] = uint32_t(p[i]) << 16;
    return (v16f)u;
#endif
}
inline void store_narrow(float* p, v16f v) { store(p, v); }
inline void store_narrow(bf16* p, v16f v) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#elif defined(ONEBASE_PAIRS)
    const v16u u = (v16u)v, rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
    const v16u bits = select((v16i)(u & 0x7fffffffu) > splat(0x7f800000), u >> 16 | 0x40, rounded);
    const __m256i both = _mm256_packus_epi32((__m256i)bits.low, (__m256i)bits.high);  // each half packs its own lanes
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(both, 0xd8));
#else
    for (int i = 0; i < LANES; i++) p[i] = to_bf16(v[i]);
#endif
}
template <typename T> inline T narrow(float x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline bf16 narrow<bf16>(float x) { return to_bf16(x); }

// exp, about 1 ulp; 0 below -87, held at exp(88) above. Cephes' polynomial after removing powers of two.
inline v16f vexp(v16f x) {
    const v16i under = x < splat(-87.0f);
    x = select(under, splat(-87.0f), x);
    x = select(x > splat(88.0f), splat(88.0f), x);
    const v16f t = x * splat(1.44269504088896341f) + splat(12582912.0f);  // round to integer in the low bits
    const v16f n = t - splat(12582912.0f);
    v16f r = x - n * splat(0.693359375f);
    r = r + n * splat(2.12194440e-4f);
    v16f p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    const v16i exponent = ((v16i)t - 0x4b400000) << 23;
    const v16f scaled = (v16f)((v16i)p + exponent);
    return select(under, v16f{}, scaled);
}

// Memory that a later phase will read, fetched a few lines at a time while the tile unit is busy.
struct Ahead {
    struct Span {
        const char *at, *end;
    } spans[16];
    int count = 0, now = 0;
    void add(const void* from, size_t bytes) {
        if (count < 16) spans[count++] = {(const char*)from, (const char*)from + bytes};
    }
    void tick() {
        for (int line = 0; line < 8 && now < count; line++) {
            Span& span = spans[now];
            __builtin_prefetch(span.at, 0, 2);
            span.at += 64;
            now += span.at >= span.end;
        }
    }
};

struct Range {
    int begin, end;
};
// A thread's contiguous share of `total` items.
inline Range share(int total, int thread, int threads) {
    return {int(int64_t(total) * thread / threads), int(int64_t(total) * (thread + 1) / threads)};
}

}  // namespace onebase
