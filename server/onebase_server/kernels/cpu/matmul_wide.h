// Matmuls in fp32 vectors for any CPU and for fp32 compute: 16 output features a vector, k in ascending order.
// In bf16 mode weights are rounded to bf16(code * absmax) and activations arrive rounded, so values are those of AMX.
#pragma once

#include "model.h"

namespace onebase {

// The 16 codes at the low nibble of each lane.
inline v16f lookup(const float* code, v16u word) {
#if defined(__AVX512F__)
    return (v16f)_mm512_permutexvar_ps((__m512i)word, _mm512_loadu_ps(code));
#elif defined(ONEBASE_PAIRS)
    const __m256 low = _mm256_loadu_ps(code), high = _mm256_loadu_ps(code + 8);
    auto half = [&](v8u index) {
        const __m256i i = (__m256i)index;
        const __m256 a = _mm256_permutevar8x32_ps(low, i), b = _mm256_permutevar8x32_ps(high, i);
        return (v8f)_mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
    };
    return {half(word.low), half(word.high)};
#else
    v16f out;
    for (int i = 0; i < LANES; i++) out[i] = code[word[i] & 15];
    return out;
#endif
}

// 16 features x 64 k -> [64][16] values. A lane's word holds the nibbles of eight k of its feature.
template <bool ROUND>
inline void decode_wide(const uint8_t* source, const float* code, float* out) {
    const v16f absmax = load((const float*)source);
    for (int c = 0; c < 8; c++) {
        v16u word = read<v16u>(source + 64 + 64 * c);
        for (int j = 0; j < 8; j++) {
            const v16f value = lookup(code, word) * absmax;
            store(out + (8 * c + j) * LANES, ROUND ? round_bf16(value) : value);
            word >>= 4;
        }
    }
}

// decode_wide and accumulate at once, for one token: a sum waits for the one before it, and decoding fills the gaps.
template <bool ROUND>
inline void decode_and_accumulate(const uint8_t* source, const float* code, const float* x, float* acc) {
    const v16f absmax = load((const float*)source);
    v16f sum = load(acc);
    for (int c = 0; c < 8; c++) {
        v16u word = read<v16u>(source + 64 + 64 * c);
        for (int j = 0; j < 8; j++) {
            const v16f value = lookup(code, word) * absmax;
            sum += (ROUND ? round_bf16(value) : value) * splat(x[8 * c + j]);
            word >>= 4;
        }
    }
    store(acc, sum);
}

// acc[m] += sum over k of w[k][16] * x[m][k], for M tokens at once; k ascending.
template <int M>
inline void accumulate(const float* w, int k, const float* x, int ldx, float* acc) {
    v16f sums[M];
    for (int m = 0; m < M; m++) sums[m] = load(acc + m * LANES);
    for (int i = 0; i < k; i++) {
        const v16f column = load(w + i * LANES);
        for (int m = 0; m < M; m++) sums[m] += column * splat(x[size_t(m) * ldx + i]);
    }
    for (int m = 0; m < M; m++) store(acc + m * LANES, sums[m]);
}
#ifdef ONEBASE_PAIRS
constexpr int AT_ONCE = 6;  // twelve of sixteen registers hold their sums
#else
constexpr int AT_ONCE = 8;
#endif
inline void accumulate_all(const float* w, int k, const float* x, int ldx, int count, float* acc) {
    int m = 0;
    for (; m + AT_ONCE <= count; m += AT_ONCE) accumulate<AT_ONCE>(w, k, x + size_t(m) * ldx, ldx, acc + m * LANES);
    for (; m + 2 <= count; m += 2) accumulate<2>(w, k, x + size_t(m) * ldx, ldx, acc + m * LANES);
    if (m < count) accumulate<1>(w, k, x + size_t(m) * ldx, ldx, acc + m * LANES);
}

// y[token][feature] for strips [range). x [count][k] fp32; scratch: 64 * 16 + count * 16 floats.
template <bool ROUND>
inline void nf4_matmul_wide(const Linear& w, const float* code, const float* x, int count, Range range, float* scratch, float* y) {
    const int blocks = w.k / BLOCK, ldy = row_stride(w.n);
    float* acc = scratch + BLOCK * LANES;
    for (int s = range.begin; s < range.end; s++) {
        memset(acc, 0, sizeof(float) * LANES * count);
        for (int kb = 0; kb < blocks; kb++) {
            const uint8_t* block = w.data + (size_t(s) * blocks + kb) * BLOCK_BYTES;
            if (count == 1) {
                decode_and_accumulate<ROUND>(block, code, x + kb * BLOCK, acc);
            } else {
                decode_wide<ROUND>(block, code, scratch);
                accumulate_all(scratch, BLOCK, x + kb * BLOCK, w.k, count, acc);
            }
        }
        for (int m = 0; m < count; m++) memcpy(y + size_t(m) * ldy + s * STRIP, acc + m * LANES, 64);
    }
}

// y[token][row] for rows [16 * begin, 16 * end) of a plain matrix [n, k]: lanes run along k, rows one by one.
template <typename T>
inline void plain_matmul_wide(const T* w, int k, const float* x, int count, Range strips, float* y, int ldy) {
    for (int n = strips.begin * STRIP; n < strips.end * STRIP; n++) {
        const T* row = w + size_t(n) * k;
        for (int m = 0; m < count; m++) {
            const float* own = x + size_t(m) * k;
            v16f a{}, b{};
            for (int i = 0; i < k; i += 2 * LANES) {
                a += load_wide(row + i) * load(own + i);
                b += load_wide(row + i + LANES) * load(own + i + LANES);
            }
            y[size_t(m) * ldy + n] = sum(a + b);
        }
    }
}

}  // namespace onebase
