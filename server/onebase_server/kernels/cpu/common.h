// Types and small helpers shared by the CPU kernels: 16-lane vectors that any compiler target can lower, bf16.
// Every reduction here has one fixed order, so that a row's result never depends on the batch around it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define ONEBASE_AMX 1
#endif

namespace onebase {

constexpr int LANES = 16;
constexpr int BLOCK = 64;        // weights that share one absmax
constexpr int STRIP = 16;        // output features repacked together
constexpr int KEYS = 16;         // keys in a tile of the KV cache
constexpr int SPLIT = 64;        // keys an online softmax step takes, aligned to position 0
constexpr int BLOCK_BYTES = 64 + STRIP * BLOCK / 2;  // 16 absmax in fp32, then the nibbles

typedef float v16f __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t v16i __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t v16u __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t bf16;

inline v16f load(const float* p) { return *reinterpret_cast<const v16f*>(p); }
inline void store(float* p, v16f v) { *reinterpret_cast<v16f*>(p) = v; }
inline v16f splat(float x) { return x - v16f{}; }

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
#else
    for (int i = 0; i < LANES; i++) p[i] = to_bf16(v[i]);
#endif
}
template <typename T> inline T narrow(float x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline bf16 narrow<bf16>(float x) { return to_bf16(x); }

// Halves are added pairwise: the same tree on every target.
inline float sum(v16f v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float a[16];
    memcpy(a, &v, 64);
    for (int w = 8; w; w /= 2)
        for (int i = 0; i < w; i++) a[i] += a[i + w];
    return a[0];
#endif
}
inline float max_of(v16f v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float top = v[0];
    for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
    return top;
#endif
}

// exp, about 1 ulp; 0 below -87, held at exp(88) above. Cephes' polynomial after removing powers of two.
inline v16f vexp(v16f x) {
    const v16i under = x < splat(-87.0f);
    x = under ? splat(-87.0f) : x;
    x = x > splat(88.0f) ? splat(88.0f) : x;
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
    return under ? v16f{} : scaled;
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
