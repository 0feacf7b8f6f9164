// The same attention on AMX for bf16: up to 16 (token, head) rows are one tile of queries. Weights of V are rounded to
// bf16, as flash attention does. Rows of a tile don't touch each other, so a row's result is the same alone.
#pragma once

#include "attention.h"
#include "matmul_amx.h"

#ifdef ONEBASE_AMX
namespace onebase {

// Tiles 0-3 accumulate [rows][16]; 4 queries or weights; 5 keys [16 pairs][16]; 6 values [8 pairs][16]; 7 weights.
inline void configure_attention(int rows) {
    TileConfig config;
    for (int t = 0; t < 5; t++) {
        config.rows[t] = uint8_t(rows);
        config.bytes[t] = 64;
    }
    config.rows[5] = 16, config.bytes[5] = 64;
    config.rows[6] = 8, config.bytes[6] = 64;
    config.rows[7] = uint8_t(rows), config.bytes[7] = 32;
    tile_configure(config);
}

#define ONEBASE_SCORE(C)                                                                   \
    if (C < tiles) {                                                                       \
        const bf16* keys = k.tile(paging.tile(first + C * KEYS), group);                   \
        TILE_ZERO(C);                                                                      \
        for (int d = 0; d < k.head; d += 32) {                                             \
            TILE_LOAD(4, q + d, ldq * 2);                                                  \
            TILE_LOAD(5, keys + d * KEYS, 64);                                             \
            TILE_DOT(C, 4, 5);                                                             \
        }                                                                                  \
        TILE_STORE(C, s + C * KEYS, SPLIT * 4);                                            \
    }
#define ONEBASE_VALUE(C)                                 \
    if (d + C * LANES < k.head) {                        \
        TILE_LOAD(6, values + C * 32, k.head * 4);     \
        TILE_DOT(C, 7, 6);                         \
    }

// Scores [count][SPLIT] of keys from `first` -> weights in bf16; factors[r] for what row r had summed before.
inline void softmax_rows(float* s, int first, float scale, Row* rows, int count, bf16* weights, float* factors) {
    alignas(64) float drop[16] = {};
    for (int r = 0; r < count; r++) {
        const int visible = rows[r].position - first + 1;  // keys of this split that the row may see
        v16f part[SPLIT / LANES], top = splat(-3.0e38f);
        for (int i = 0; i < SPLIT / LANES; i++) {
            part[i] = load(s + r * SPLIT + i * LANES) * splat(scale);
            if (visible < SPLIT) part[i] = select(counted() < splat(visible - i * LANES), part[i], splat(-3.0e38f));
            top = part[i] > top ? part[i] : top;
            store(s + r * SPLIT + i * LANES, part[i]);
        }
        const float highest = max_of(top), before = rows[r].maximum;
        rows[r].maximum = highest > before ? highest : before;
        drop[r] = before - rows[r].maximum;
    }
    store(factors, vexp(load(drop)));
    for (int r = 0; r < count; r++) {
        v16f weight[SPLIT / LANES];
        for (int i = 0; i < SPLIT / LANES; i++) {
            weight[i] = vexp(load(s + r * SPLIT + i * LANES) - splat(rows[r].maximum));
            store_narrow(weights + r * SPLIT + i * LANES, weight[i]);
        }
        const float added = sum((weight[0] + weight[1]) + (weight[2] + weight[3]));
        rows[r].total = rows[r].total * factors[r] + added;
    }
}

// The next split's tiles, so that they are near when their turn comes: the hardware cannot guess the page table.
inline void prefetch(const Cache<bf16>& cache, int group, const Paging& paging, int first, int last) {
    for (int key = first; key < first + SPLIT && key <= last; key += KEYS) {
        const char* tile = (const char*)cache.tile(paging.tile(key), group);
        for (int i = 0; i < KEYS * cache.head * 2; i += 64) __builtin_prefetch(tile + i, 0, 2);
    }
}

// q: `count` rows of `ldq` values (gathered by the caller), out [count][head] fp32.
inline void attend_amx(const Cache<bf16>& k, const Cache<bf16>& v, int group, const Paging& paging, const bf16* q, int ldq,
                       Row* rows, int count, float scale, float* out) {
    alignas(64) float s[16 * SPLIT], added[16 * 64], factors[16];
    alignas(64) bf16 weights[16 * SPLIT];
    int last = 0;
    for (int r = 0; r < count; r++) last = rows[r].position > last ? rows[r].position : last;
    memset(out, 0, sizeof(float) * count * k.head);
    configure_attention(count);
    for (int first = 0; first <= last; first += SPLIT) {
        const int left = (last - first) / KEYS + 1, tiles = left < SPLIT / KEYS ? left : SPLIT / KEYS;
        prefetch(k, group, paging, first + SPLIT, last);
        prefetch(v, group, paging, first + SPLIT, last);
        ONEBASE_SCORE(0) ONEBASE_SCORE(1) ONEBASE_SCORE(2) ONEBASE_SCORE(3)
        softmax_rows(s, first, scale, rows, count, weights, factors);
        for (int d = 0; d < k.head; d += 64) {
            TILE_ZERO(0); TILE_ZERO(1); TILE_ZERO(2); TILE_ZERO(3);
            for (int t = 0; t < tiles; t++) {
                const bf16* values = v.tile(paging.tile(first + t * KEYS), group) + d * 2;
                TILE_LOAD(7, weights + t * KEYS, SPLIT * 2);
                ONEBASE_VALUE(0) ONEBASE_VALUE(1) ONEBASE_VALUE(2) ONEBASE_VALUE(3)
            }
            TILE_STORE(0, added, 256); TILE_STORE(1, added + 16, 256);
            TILE_STORE(2, added + 32, 256); TILE_STORE(3, added + 48, 256);
            for (int r = 0; r < count; r++)
                for (int i = 0; i < 64 && d + i < k.head; i += LANES) {
                    float* at = out + r * k.head + d + i;
                    store(at, load(at) * splat(factors[r]) + load(added + r * 64 + i));
                }
        }
    }
    for (int r = 0; r < count; r++) {
        const v16f inverse = splat(1.0f / rows[r].total);
        for (int d = 0; d < k.head; d += LANES) store(out + r * k.head + d, load(out + r * k.head + d) * inverse);
    }
}
#undef ONEBASE_SCORE
#undef ONEBASE_VALUE

}  // namespace onebase
#endif
