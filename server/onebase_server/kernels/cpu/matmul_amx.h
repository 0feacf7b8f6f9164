// Matmuls on AMX: weights are the A operand (16 output features a tile), packed bf16 activations the B operand.
// A weight is decoded once a strip, by table lookup into exactly bf16(code * absmax). Each output element adds its
// products tile after tile along k, whatever the number of tokens: that is what makes the batch invisible to a row.
#pragma once

#include "amx.h"
#include "model.h"

#ifdef ONEBASE_AMX
namespace onebase {

constexpr int TILE = 512;  // bf16 values in a tile of 16 features x 32 k

// Tiles 0-3 accumulate [16, columns], 4-5 hold weights, 6-7 activations [16 k pairs, columns].
inline void configure_matmul(int columns) {
    TileConfig config;
    for (int t = 0; t < 8; t++) {
        config.rows[t] = 16;
        config.bytes[t] = uint16_t(t == 4 || t == 5 ? 64 : 4 * columns);
    }
    tile_configure(config);
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

// 16 x 16 transpose of 32-bit values in registers.
inline void transpose(__m512 r[16]) {
    __m512d t[16];
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            const __m512d a = (__m512d)(j ? _mm512_unpackhi_ps(r[i], r[i + 1]) : _mm512_unpacklo_ps(r[i], r[i + 1]));
            const __m512d b = (__m512d)(j ? _mm512_unpackhi_ps(r[i + 2], r[i + 3]) : _mm512_unpacklo_ps(r[i + 2], r[i + 3]));
            t[i + 2 * j] = _mm512_unpacklo_pd(a, b), t[i + 2 * j + 1] = _mm512_unpackhi_pd(a, b);
        }
    for (int j = 0; j < 4; j++) {
        const __m512 a = (__m512)t[j], b = (__m512)t[4 + j], c = (__m512)t[8 + j], d = (__m512)t[12 + j];
        const __m512 ab0 = _mm512_shuffle_f32x4(a, b, 0x88), ab1 = _mm512_shuffle_f32x4(a, b, 0xDD);
        const __m512 cd0 = _mm512_shuffle_f32x4(c, d, 0x88), cd1 = _mm512_shuffle_f32x4(c, d, 0xDD);
        r[j] = _mm512_shuffle_f32x4(ab0, cd0, 0x88), r[8 + j] = _mm512_shuffle_f32x4(ab0, cd0, 0xDD);
        r[4 + j] = _mm512_shuffle_f32x4(ab1, cd1, 0x88), r[12 + j] = _mm512_shuffle_f32x4(ab1, cd1, 0xDD);
    }
}

// Rows x[valid][k] -> pairs [k / 2][columns], columns <= 16; rows from `valid` on are zero. `ldx`: values between rows.
inline void pack_rows(const bf16* x, size_t ldx, int valid, int columns, int k, uint32_t* out) {
    const __mmask16 mask = __mmask16((1u << columns) - 1);
    for (int part = 0; part < k; part += 32, out += 16 * columns) {
        __m512 r[16];
        for (int i = 0; i < 16; i++) r[i] = i < valid ? _mm512_loadu_ps(x + i * ldx + part) : _mm512_setzero_ps();
        transpose(r);
        for (int i = 0; i < 16; i++) _mm512_mask_storeu_ps(out + i * columns, mask, r[i]);
    }
}

// Accumulator [16 features][columns], stored with rows of 16, -> y[column][feature] with row stride `ldy`.
inline void scatter(const float* c, int valid, float* y, int ldy) {
    if (valid == 1) {
        const __m512i rows = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(16));
        _mm512_storeu_ps(y, _mm512_i32gather_ps(rows, c, 4));
        return;
    }
    __m512 r[16];
    for (int n = 0; n < 16; n++) r[n] = _mm512_load_ps(c + 16 * n);
    transpose(r);
    for (int m = 0; m < valid; m++) _mm512_storeu_ps(y + size_t(m) * ldy, r[m]);
}

struct Tokens {
    const uint32_t* packed;  // blocks of `columns` tokens: [block][k / 2][columns] pairs of bf16
    int count, columns, k;
    int blocks() const { return (count + columns - 1) / columns; }
    const uint32_t* block(int b) const { return packed + size_t(b) * columns * (k / 2); }
    int valid(int b) const { return count - b * columns < columns ? count - b * columns : columns; }
};
inline int columns_for(int tokens) { return tokens < 16 ? tokens : 16; }

inline void store_accumulators(const Tokens& x, int block, int strips, int blocks, float* y, int ldy) {
    alignas(64) float c[4][256];
    TILE_STORE(0, c[0], 64);
    TILE_STORE(1, c[1], 64);
    TILE_STORE(2, c[2], 64);
    TILE_STORE(3, c[3], 64);
    for (int b = 0; b < blocks; b++)
        for (int s = 0; s < strips; s++)
            scatter(c[strips * b + s], x.valid(block + b), y + size_t(block + b) * x.columns * ldy + s * STRIP, ldy);
}

// S strips x B blocks of tokens (S * B <= 4: independent chains hide the tile unit's latency), decoded a block ahead.
template <int S, int B>
inline void strips_few(const uint8_t* data, int blocks, const Tokens& x, __m512 code, bf16* scratch, float* y, int ldy, Ahead& ahead) {
    const size_t strip_bytes = size_t(blocks) * BLOCK_BYTES;
    TILE_ZERO(0); TILE_ZERO(1); TILE_ZERO(2); TILE_ZERO(3);
    for (int s = 0; s < S; s++) decode_block(data + s * strip_bytes, scratch + s * 2 * TILE, code);
    for (int kb = 0; kb < blocks; kb++) {
        const bf16* now = scratch + (kb & 1) * 8 * TILE;
        bf16* next = scratch + (~kb & 1) * 8 * TILE;
        ahead.tick();
        if (kb + 1 < blocks)
            for (int s = 0; s < S; s++)
                decode_block(data + s * strip_bytes + (kb + 1) * BLOCK_BYTES, next + s * 2 * TILE, code);
        for (int half = 0; half < 2; half++, now += TILE) {
            const size_t at = size_t(kb * 32 + half * 16) * x.columns;
            TILE_LOAD(6, x.packed + at, 4 * x.columns);
            TILE_LOAD(4, now, 64);
            TILE_DOT(0, 4, 6);
            if (S > 1) {
                TILE_LOAD(5, now + 2 * TILE, 64);
                TILE_DOT(1, 5, 6);
            }
            if (B > 1) {
                TILE_LOAD(7, x.block(1) + at, 4 * x.columns);
                if (S == 1) TILE_DOT(1, 4, 7);
                else {
                    TILE_DOT(2, 4, 7);
                    TILE_DOT(3, 5, 7);
                }
            } else if (S > 2) {
                TILE_LOAD(4, now + 4 * TILE, 64);
                TILE_DOT(2, 4, 6);
                TILE_LOAD(5, now + 6 * TILE, 64);
                TILE_DOT(3, 5, 6);
            }
        }
    }
    store_accumulators(x, 0, S, B, y, ldy);
}

// S strips x B blocks of tokens, weights as tiles in memory (decoded, or lm_head's own rows).
struct TileSource {
    const bf16* at;
    size_t row_bytes, step, strip;  // bytes between features; values between k tiles; values between strips
};
template <int S, int B>
inline void tiles_many(const TileSource& w, int steps, const Tokens& x, int block, float* y, int ldy) {
    TILE_ZERO(0); TILE_ZERO(1); TILE_ZERO(2); TILE_ZERO(3);
    const uint32_t* x0 = x.block(block);
    const uint32_t* x1 = x.block(block + (B > 1));
    for (int k = 0; k < steps; k++) {
        TILE_LOAD(4, w.at + k * w.step, w.row_bytes);
        if (S > 1) TILE_LOAD(5, w.at + w.strip + k * w.step, w.row_bytes);
        TILE_LOAD(6, x0 + size_t(k) * 16 * x.columns, 4 * x.columns);
        TILE_DOT(0, 4, 6);
        if (S > 1) TILE_DOT(1, 5, 6);
        if (B > 1) {
            TILE_LOAD(7, x1 + size_t(k) * 16 * x.columns, 4 * x.columns);
            if (S == 1) TILE_DOT(1, 4, 7);
            else {
                TILE_DOT(2, 4, 7);
                TILE_DOT(3, 5, 7);
            }
        }
    }
    store_accumulators(x, block, S, B, y, ldy);
}
template <int S>
inline void all_blocks(const TileSource& w, int steps, const Tokens& x, float* y, int ldy) {
    int b = 0;
    for (; b + 1 < x.blocks(); b += 2) tiles_many<S, 2>(w, steps, x, b, y, ldy);
    if (b < x.blocks()) tiles_many<S, 1>(w, steps, x, b, y, ldy);
}

// y[token][feature] for strips [range): this thread's share. `scratch` holds 2 decoded strips or 16 tiles.
inline void nf4_matmul_amx(const Linear& w, const float* code16, const Tokens& x, Range range, bf16* scratch, float* y, Ahead ahead = {}) {
    const int blocks = w.k / BLOCK, ldy = row_stride(w.n);
    const size_t strip_bytes = size_t(blocks) * BLOCK_BYTES;
    const __m512 code = _mm512_loadu_ps(code16);
    configure_matmul(x.columns);
    int s = range.begin;
    if (x.blocks() <= 2) {
        for (; s < range.end;) {
            const uint8_t* data = w.data + s * strip_bytes;
            float* out = y + s * STRIP;
            const int left = range.end - s;
            if (x.blocks() == 2) {
                if (left > 1) strips_few<2, 2>(data, blocks, x, code, scratch, out, ldy, ahead);
                else strips_few<1, 2>(data, blocks, x, code, scratch, out, ldy, ahead);
                s += 2;
            } else if (left >= 4) {
                strips_few<4, 1>(data, blocks, x, code, scratch, out, ldy, ahead);
                s += 4;
            } else {
                if (left > 1) strips_few<2, 1>(data, blocks, x, code, scratch, out, ldy, ahead);
                else strips_few<1, 1>(data, blocks, x, code, scratch, out, ldy, ahead);
                s += 2;
            }
        }
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
