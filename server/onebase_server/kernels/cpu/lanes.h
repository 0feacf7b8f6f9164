// Sixteen lanes as one value: the compiler's own vector, which it lowers to any target; on AVX2 a pair of eights.
// Compilers keep a vector wider than a register in memory, where every operation loads and stores it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace onebase {

constexpr int LANES = 16;

#if defined(__AVX2__) && !defined(__AVX512F__)
#define ONEBASE_PAIRS 1
typedef float v8f __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef uint32_t v8u __attribute__((vector_size(32)));

template <typename V> struct Pair {
    V low, high;
    auto operator[](int i) const { return i < 8 ? low[i] : high[i - 8]; }
    template <typename W> explicit operator Pair<W>() const { return {(W)low, (W)high}; }
};
template <typename V> struct Lane;
template <> struct Lane<v8f> { typedef float type; };
template <> struct Lane<v8i> { typedef int32_t type; };
template <> struct Lane<v8u> { typedef uint32_t type; };
template <typename V> using lane = typename Lane<V>::type;

#define ONEBASE_EACH(OP)                                                                                             \
    template <typename V> inline Pair<V> operator OP(Pair<V> x, Pair<V> y) { return {x.low OP y.low, x.high OP y.high}; } \
    template <typename V> inline Pair<V> operator OP(Pair<V> x, lane<V> y) { return {x.low OP y, x.high OP y}; }      \
    template <typename V, typename Y> inline Pair<V>& operator OP##=(Pair<V>& x, Y y) { return x = x OP y; }
ONEBASE_EACH(+)
ONEBASE_EACH(-)
ONEBASE_EACH(*)
ONEBASE_EACH(/)
ONEBASE_EACH(&)
ONEBASE_EACH(|)
ONEBASE_EACH(<<)
ONEBASE_EACH(>>)
#undef ONEBASE_EACH
#define ONEBASE_COMPARE(OP)                                                      \
    template <typename V> inline Pair<v8i> operator OP(Pair<V> x, Pair<V> y) { \
        return {(v8i)(x.low OP y.low), (v8i)(x.high OP y.high)};                 \
    }
ONEBASE_COMPARE(<)
ONEBASE_COMPARE(>)
ONEBASE_COMPARE(>=)
#undef ONEBASE_COMPARE
template <typename V> inline Pair<V> operator-(Pair<V> x) { return {-x.low, -x.high}; }

typedef Pair<v8f> v16f;
typedef Pair<v8i> v16i;
typedef Pair<v8u> v16u;

template <typename V> inline Pair<V> select(v16i mask, Pair<V> x, Pair<V> y) {
    return {mask.low ? x.low : y.low, mask.high ? x.high : y.high};
}
inline v16f splat(float x) { return {x - v8f{}, x - v8f{}}; }
inline v16i splat(int32_t x) { return {x - v8i{}, x - v8i{}}; }
#else
typedef float v16f __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t v16i __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t v16u __attribute__((vector_size(64), aligned(4), may_alias));

template <typename V> inline V select(v16i mask, V x, V y) { return mask ? x : y; }
inline v16f splat(float x) { return x - v16f{}; }
inline v16i splat(int32_t x) { return x - v16i{}; }
#endif

// 64 bytes from anywhere.
template <typename V> inline V read(const void* from) {
#if defined(ONEBASE_PAIRS)
    const __m256i* at = (const __m256i*)from;
    return V(v16i{(v8i)_mm256_loadu_si256(at), (v8i)_mm256_loadu_si256(at + 1)});
#else
    V v;
    memcpy(&v, from, 64);
    return v;
#endif
}
inline v16f load(const float* p) { return read<v16f>(p); }
inline void store(float* p, v16f v) {
#if defined(ONEBASE_PAIRS)
    _mm256_storeu_ps(p, (__m256)v.low);
    _mm256_storeu_ps(p + 8, (__m256)v.high);
#else
    memcpy(p, &v, 64);
#endif
}

inline v16i counted() {
    static const int32_t lanes[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return read<v16i>(lanes);
}

// Halves are added pairwise: the same tree on every target.
inline float sum(v16f v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(ONEBASE_PAIRS)
    const __m256 eight = (__m256)(v.low + v.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
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
#elif defined(ONEBASE_PAIRS)
    const __m256 eight = _mm256_max_ps((__m256)v.low, (__m256)v.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
    float top = v[0];
    for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
    return top;
#endif
}

}  // namespace onebase
