// Matmuls on AMX: weights are the A operand (16 output features a tile), packed bf16 activations the B operand.
// A weight is decoded once a strip, by table lookup into exactly bf16(code * absmax). Each output element adds its
// products tile after tile along k, whatever the number of tokens: that is what makes the batch invisible to a row.
#pragma once

#include "model.h"

#ifdef ONEBASE_AMX
namespace onebase {

constexpr int TILE = 512;  // bf16 values in a tile of 16 features x 32 k

struct __attribute__((packed)) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0-3 accumulate [16, columns], 4-5 hold weights, 6-7 activations [16 k pairs, columns].
inline void configure_matmul(int columns) {
    TileConfig config;
    for (int t = 0; t < 8; t++) {
        config.rows[t] = 16;
        config.bytes[t] = uint16_t(t == 4 || t == 5 ? 64 : 4 * columns);
    }
    _tile_loadconfig(&config);
}

// 16 features x 64 k -> two tiles [16][32]. A word holds four nibbles: two of one row, two of the next.
inline void decode_block(const uint8_t* source, bf16* tiles, __m512 code) {
    const float* absmax = (const float*)source;
    for (int pair = 0; pair < 8; pair++) {
        const __m512 even = _mm512_mul_ps(code, _mm512_set1_ps(absmax[2 * pair]));
        const __m512 odd = _mm512_mul_ps(code, _mm512_set1_ps(absmax[2 * pair + 1]));
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
        const __m512i first = _mm512_shuffle_i64x2(both, both, 0x44), second = _mm512_shuffle_i64x2(both, both, 0xEE);
        const __m512i w = _mm512_loadu_si512(source + 64 + 64 * pair);
        bf16* row = tiles + 64 * pair;
        _mm512_store_si512(row, _mm512_permutexvar_epi16(w, first));
        _mm512_store_si512(row + TILE, _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4), first));
        _mm512_store_si512(row + 32, _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 8), second));
        _mm512_store_si512(row + TILE + 32, _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 12), second));
    }
}

// Accumulator [16 features][columns] -> y[column][feature] with row stride `ldy`.
inline void scatter(const float* c, int columns, int valid, float* y, int ldy) {
    if (columns == 1) {
        memcpy(y, c, 64);
        return;
    }
    for (int m = 0; m < valid; m++) {
        v16f row;
        for (int n = 0; n < STRIP; n++) row[n] = c[n * columns + m];
        store(y + size_t(m) * ldy, row);
    }
}

struct Tokens {
    const uint32_t* packed;  // blocks of `columns` tokens: [block][k / 2][columns] pairs of bf16
    int count, columns, k;
    int blocks() const { return (count + columns - 1) / columns; }
    const uint32_t* block(int b) const { return packed + size_t(b) * columns * (k / 2); }
    int valid(int b) const { return count - b * columns < columns ? count - b * columns : columns; }
};
inline int columns_for(int tokens) { return tokens < 16 ? tokens : 16; }

// Up to 16 tokens, S strips at once (independent chains hide the tile unit's latency). Decoding runs a block ahead.
#define ONEBASE_STEP(STRIP_INDEX, C)                                                          \
    if (S > STRIP_INDEX) {                                                                    \
        _tile_loadd(4, now + (STRIP_INDEX * 2 + half) * TILE, 64);                            \
        _tile_dpbf16ps(C, 4, 6);                                                              \
    }
template <int S>
inline void strips_few(const uint8_t* data, int blocks, const Tokens& x, __m512 code, bf16* scratch, float* y, int ldy) {
    const size_t strip_bytes = size_t(blocks) * BLOCK_BYTES;
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int s = 0; s < S; s++) decode_block(data + s * strip_bytes, scratch + s * 2 * TILE, code);
    for (int kb = 0; kb < blocks; kb++) {
        bf16* now = scratch + (kb & 1) * 8 * TILE;
        bf16* next = scratch + (~kb & 1) * 8 * TILE;
        if (kb + 1 < blocks)
            for (int s = 0; s < S; s++)
                decode_block(data + s * strip_bytes + (kb + 1) * BLOCK_BYTES, next + s * 2 * TILE, code);
        for (int half = 0; half < 2; half++) {
            _tile_loadd(6, x.packed + size_t(kb * 32 + half * 16) * x.columns, 4 * x.columns);
            ONEBASE_STEP(0, 0) ONEBASE_STEP(1, 1) ONEBASE_STEP(2, 2) ONEBASE_STEP(3, 3)
        }
    }
    alignas(64) float c[4][256];
    _tile_stored(0, c[0], 4 * x.columns);
    if (S > 1) _tile_stored(1, c[1], 4 * x.columns);
    if (S > 2) _tile_stored(2, c[2], 4 * x.columns);
    if (S > 3) _tile_stored(3, c[3], 4 * x.columns);
    for (int s = 0; s < S; s++) scatter(c[s], x.columns, x.count, y + s * STRIP, ldy);
}
#undef ONEBASE_STEP

// S strips x B blocks of tokens, weights as tiles in memory (decoded, or lm_head's own rows).
struct TileSource {
    const bf16* at;
    size_t row_bytes, step, strip;  // bytes between features; values between k tiles; values between strips
};
template <int S, int B>
inline void tiles_many(const TileSource& w, int steps, const Tokens& x, int block, float* y, int ldy) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    const uint32_t* x0 = x.block(block);
    const uint32_t* x1 = x.block(block + (B > 1));
    for (int k = 0; k < steps; k++) {
        _tile_loadd(4, w.at + k * w.step, w.row_bytes);
        if (S > 1) _tile_loadd(5, w.at + w.strip + k * w.step, w.row_bytes);
        _tile_loadd(6, x0 + size_t(k) * 16 * x.columns, 4 * x.columns);
        _tile_dpbf16ps(0, 4, 6);
        if (S > 1) _tile_dpbf16ps(1, 5, 6);
        if (B > 1) {
            _tile_loadd(7, x1 + size_t(k) * 16 * x.columns, 4 * x.columns);
            _tile_dpbf16ps(2, 4, 7);
            if (S > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    alignas(64) float c[4][256];
    _tile_stored(0, c[0], 4 * x.columns);
    if (S > 1) _tile_stored(1, c[1], 4 * x.columns);
    if (B > 1) _tile_stored(2, c[2], 4 * x.columns);
    if (S > 1 && B > 1) _tile_stored(3, c[3], 4 * x.columns);
    for (int b = 0; b < B; b++)
        for (int s = 0; s < S; s++)
            scatter(c[2 * b + s], x.columns, x.valid(block + b), y + size_t(block + b) * x.columns * ldy + s * STRIP, ldy);
}
template <int S>
inline void all_blocks(const TileSource& w, int steps, const Tokens& x, float* y, int ldy) {
    int b = 0;
    for (; b + 1 < x.blocks(); b += 2) tiles_many<S, 2>(w, steps, x, b, y, ldy);
    if (b < x.blocks()) tiles_many<S, 1>(w, steps, x, b, y, ldy);
}

// y[token][feature] for strips [range): this thread's share. `scratch` holds 2 decoded strips or 16 tiles.
inline void nf4_matmul_amx(const Linear& w, const float* code16, const Tokens& x, Range range, bf16* scratch, float* y) {
    const int blocks = w.k / BLOCK, ldy = padded(w.n);
    const size_t strip_bytes = size_t(blocks) * BLOCK_BYTES;
    const __m512 code = _mm512_loadu_ps(code16);
    configure_matmul(x.columns);
    int s = range.begin;
    if (x.count <= 16) {
        for (; s + 4 <= range.end; s += 4)
            strips_few<4>(w.data + s * strip_bytes, blocks, x, code, scratch, y + s * STRIP, ldy);
        for (; s + 2 <= range.end; s += 2)
            strips_few<2>(w.data + s * strip_bytes, blocks, x, code, scratch, y + s * STRIP, ldy);
        if (s < range.end) strips_few<1>(w.data + s * strip_bytes, blocks, x, code, scratch, y + s * STRIP, ldy);
        return;
    }
    const size_t strip = size_t(w.k) * STRIP;
    for (; s < range.end; s += 2) {
        const int here = range.end - s < 2 ? 1 : 2;
        for (int i = 0; i < here; i++)
            for (int kb = 0; kb < blocks; kb++)
                decode_block(w.data + (s + i) * strip_bytes + size_t(kb) * BLOCK_BYTES,
                             scratch + i * strip + size_t(kb) * 2 * TILE, code);
        const TileSource source{scratch, 64, TILE, strip};
        if (here == 2) all_blocks<2>(source, w.k / 32, x, y + s * STRIP, ldy);
        else all_blocks<1>(source, w.k / 32, x, y + s * STRIP, ldy);
    }
}

// y[token][row] for rows [16 * begin, 16 * end) of a plain bf16 matrix [n, k]; n a multiple of 16, k of 32.
inline void bf16_matmul_amx(const bf16* w, int k, const Tokens& x, Range strips, float* y, int ldy) {
    configure_matmul(x.columns);
    int s = strips.begin;
    for (; s < strips.end; s += 2) {
        const TileSource source{w + size_t(s) * STRIP * k, size_t(k) * 2, 32, size_t(STRIP) * k};
        if (s + 1 < strips.end) all_blocks<2>(source, k / 32, x, y + s * STRIP, ldy);
        else all_blocks<1>(source, k / 32, x, y + s * STRIP, ldy);
    }
}

}  // namespace onebase
#endif
