// Matmuls in fp32 vectors for any CPU and for fp32 compute: 16 output features a vector, k in ascending order.
// In bf16 mode weights are rounded to bf16(code * absmax) and activations arrive rounded, so values are those of AMX.
#pragma once

#include "model.h"

namespace onebase {

#if defined(__AVX2__)
// Eight lanes of `lookup`; `low` and `high` are the 16 codes.
inline __m256 lookup_half(__m256 low, __m256 high, __m256i index) {
    const __m256 a = _mm256_permutevar8x32_ps(low, index), b = _mm256_permutevar8x32_ps(high, index);
    return _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
#endif

// The 16 codes at the low nibble of each lane.
inline v16f lookup(const float* code, v16u word) {
#if defined(__AVX512F__)
    return (v16f)_mm512_permutexvar_ps((__m512i)word, _mm512_loadu_ps(code));
#elif defined(__AVX2__)
    const __m256 low = _mm256_loadu_ps(code), high = _mm256_loadu_ps(code + 8);
    return {(v8f)lookup_half(low, high, (__m256i)word.low), (v8f)lookup_half(low, high, (__m256i)word.high)};
#else
    v16f out;
    for (int i = 0; i < LANES; i++) out[i] = code[word[i] & 15];
    return out;
#endif
}

#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
#define ONEBASE_HALVES 1
// What costs most, one half after the other, so that all of its sums stay in AVX2's sixteen registers. Same operations
// in the same order as the general code, so the same bits.
inline __m256 round_bf16(__m256 x) {
    const __m256i u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    return _mm256_castsi256_ps(_mm256_and_si256(up, _mm256_set1_epi32(int(0xffff0000u))));
}
inline __m256 load_half(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load_half(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
#endif

// 16 features x 64 k -> [64][16] values. A lane's word holds the nibbles of eight k of its feature.
template <bool ROUND>
inline void decode_wide(const uint8_t* source, const float* code, float* out) {
#ifdef ONEBASE_HALVES
    const __m256 low = _mm256_loadu_ps(code), high = _mm256_loadu_ps(code + 8);
    for (int half = 0; half < 2; half++) {
        const __m256 absmax = _mm256_loadu_ps((const float*)source + 8 * half);
        for (int c = 0; c < 8; c++) {
            __m256i word = _mm256_loadu_si256((const __m256i*)(source + 64 + 64 * c + 32 * half));
            for (int j = 0; j < 8; j++) {
                const __m256 value = _mm256_mul_ps(lookup_half(low, high, word), absmax);
                _mm256_storeu_ps(out + (8 * c + j) * LANES + 8 * half, ROUND ? round_bf16(value) : value);
                word = _mm256_srli_epi32(word, 4);
            }
        }
    }
#else
    const v16f absmax = load((const float*)source);
    for (int c = 0; c < 8; c++) {
        v16u word = read<v16u>(source + 64 + 64 * c);
        for (int j = 0; j < 8; j++) {
            const v16f value = lookup(code, word) * absmax;
            store(out + (8 * c + j) * LANES, ROUND ? round_bf16(value) : value);
            word >>= 4;
        }
    }
#endif
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
#ifdef ONEBASE_HALVES
    if (M > 4) {  // one half after the other: both halves' sums would be more than there are registers
        for (int half = 0; half < 2; half++) {
            __m256 sums[M];
            for (int m = 0; m < M; m++) sums[m] = _mm256_loadu_ps(acc + m * LANES + 8 * half);
            for (int i = 0; i < k; i++) {
                const __m256 column = _mm256_loadu_ps(w + i * LANES + 8 * half);
                for (int m = 0; m < M; m++) sums[m] = _mm256_fmadd_ps(column, _mm256_broadcast_ss(x + size_t(m) * ldx + i), sums[m]);
            }
            for (int m = 0; m < M; m++) _mm256_storeu_ps(acc + m * LANES + 8 * half, sums[m]);
        }
        return;
    }
#endif
    v16f sums[M];
    for (int m = 0; m < M; m++) sums[m] = load(acc + m * LANES);
    for (int i = 0; i < k; i++) {
        const v16f column = load(w + i * LANES);
        for (int m = 0; m < M; m++) sums[m] += column * splat(x[size_t(m) * ldx + i]);
    }
    for (int m = 0; m < M; m++) store(acc + m * LANES, sums[m]);
}
inline void accumulate_all(const float* w, int k, const float* x, int ldx, int count, float* acc) {
    int m = 0;
    for (; m + 8 <= count; m += 8) accumulate<8>(w, k, x + size_t(m) * ldx, ldx, acc + m * LANES);
    for (; m + 4 <= count; m += 4) accumulate<4>(w, k, x + size_t(m) * ldx, ldx, acc + m * LANES);
    for (; m < count; m++) accumulate<1>(w, k, x + size_t(m) * ldx, ldx, acc + m * LANES);
}

constexpr int TOKENS = 96;  // whose inputs stay near while the strips go by; decoding again costs a tenth of their sums

// y[token][feature] for strips [range). x [count][k] fp32; scratch: 64 * 16 + count * 16 floats.
template <bool ROUND>
inline void nf4_matmul_wide(const Linear& w, const float* code, const float* x, int count, Range range, float* scratch, float* y) {
    const int blocks = w.k / BLOCK, ldy = row_stride(w.n);
    float* acc = scratch + BLOCK * LANES;
    for (int first = 0; first < count; first += TOKENS) {
        const int tokens = count - first < TOKENS ? count - first : TOKENS;
        for (int s = range.begin; s < range.end; s++) {
            memset(acc, 0, sizeof(float) * LANES * tokens);
            for (int kb = 0; kb < blocks; kb++) {
                const uint8_t* block = w.data + (size_t(s) * blocks + kb) * BLOCK_BYTES;
                const float* own = x + size_t(first) * w.k + kb * BLOCK;
                if (tokens == 1) {
                    decode_and_accumulate<ROUND>(block, code, own, acc);
                } else {
                    decode_wide<ROUND>(block, code, scratch);
                    accumulate_all(scratch, BLOCK, own, w.k, tokens, acc);
                }
            }
            for (int m = 0; m < tokens; m++) memcpy(y + size_t(first + m) * ldy + s * STRIP, acc + m * LANES, 64);
        }
    }
}

// y[token][row] for rows [16 * begin, 16 * end) of a plain matrix [n, k]: lanes run along k, rows one by one.
template <typename T>
inline void plain_matmul_wide(const T* w, int k, const float* x, int count, Range strips, float* y, int ldy) {
    for (int n = strips.begin * STRIP; n < strips.end * STRIP; n++) {
        const T* row = w + size_t(n) * k;
        for (int m = 0; m < count; m++) {
            const float* own = x + size_t(m) * k;
#ifdef ONEBASE_HALVES
            __m256 part[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
            for (int i = 0; i < k; i += 2 * LANES)
                for (int q = 0; q < 4; q++)
                    part[q] = _mm256_fmadd_ps(load_half(row + i + 8 * q), _mm256_loadu_ps(own + i + 8 * q), part[q]);
            y[size_t(m) * ldy + n] = sum(v16f{(v8f)(part[0] + part[2]), (v8f)(part[1] + part[3])});
#else
            v16f a{}, b{};
            for (int i = 0; i < k; i += 2 * LANES) {
                a += load_wide(row + i) * load(own + i);
                b += load_wide(row + i + LANES) * load(own + i + LANES);
            }
            y[size_t(m) * ldy + n] = sum(a + b);
#endif
        }
    }
}

}  // namespace onebase
