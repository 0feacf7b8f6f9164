// Causal attention over the paged KV cache, one unit = up to 16 (token, head) rows of one sequence and one kv head.
// Keys are taken SPLIT at a time, aligned to position 0, with an online softmax: a row's sums are the same however its
// prompt was chunked, cached or batched. Inside a page, K is stored [16 keys] wide: see `Cache`.
#pragma once

#include "model.h"

namespace onebase {

// A layer's cache as tiles of 16 keys: [page * page_size / 16][group] of 16 * head values.
// bf16: K [head / 2][16 keys][2], V [8 key pairs][head][2]. fp32: K [head][16 keys], V [16 keys][head].
template <typename T> struct Cache {
    T* base;
    int groups, head;
    T* tile(int64_t index, int group) const { return base + (index * groups + group) * int64_t(KEYS * head); }
};

inline void write_key(const Cache<bf16>& k, int64_t slot, int group, const float* values) {
    bf16* tile = k.tile(slot / KEYS, group) + slot % KEYS * 2;
    for (int d = 0; d < k.head; d++) tile[d / 2 * KEYS * 2 + d % 2] = to_bf16(values[d]);
}
inline void write_key(const Cache<float>& k, int64_t slot, int group, const float* values) {
    float* tile = k.tile(slot / KEYS, group) + slot % KEYS;
    for (int d = 0; d < k.head; d++) tile[d * KEYS] = values[d];
}
inline void write_value(const Cache<bf16>& v, int64_t slot, int group, const float* values) {
    bf16* tile = v.tile(slot / KEYS, group);
    const int key = int(slot % KEYS);
    for (int d = 0; d < v.head; d++) tile[(key / 2 * v.head + d) * 2 + key % 2] = to_bf16(values[d]);
}
inline void write_value(const Cache<float>& v, int64_t slot, int group, const float* values) {
    float* tile = v.tile(slot / KEYS, group);
    memcpy(tile + slot % KEYS * v.head, values, sizeof(float) * v.head);
}
// Values of the keys after this one in its tile become 0: what an earlier owner left there meets a weight of 0, and
// must be finite for the product to be 0.
inline void clear_after(const Cache<bf16>& v, int64_t slot, int group) {
    bf16* tile = v.tile(slot / KEYS, group);
    for (int key = int(slot % KEYS) + 1; key < KEYS; key++)
        for (int d = 0; d < v.head; d++) tile[(key / 2 * v.head + d) * 2 + key % 2] = 0;
}
inline void clear_after(const Cache<float>& v, int64_t slot, int group) {
    const int from = int(slot % KEYS) + 1;
    memset(v.tile(slot / KEYS, group) + from * v.head, 0, sizeof(float) * (KEYS - from) * v.head);
}

// q [head] . 16 keys -> 16 scores.
inline v16f scores(const Cache<bf16>& k, const bf16* tile, const bf16* q) {
    v16f even{}, odd{};
    for (int d = 0; d < k.head; d += 2) {
        const v16u pair = read<v16u>(tile + d * KEYS);
        even += (v16f)(pair << 16) * splat(to_float(q[d]));
        odd += (v16f)(pair & 0xffff0000u) * splat(to_float(q[d + 1]));
    }
    return even + odd;
}
inline v16f scores(const Cache<float>& k, const float* tile, const float* q) {
    v16f even{}, odd{};
    for (int d = 0; d < k.head; d += 2) {
        even += load(tile + d * KEYS) * splat(q[d]);
        odd += load(tile + (d + 1) * KEYS) * splat(q[d + 1]);
    }
    return even + odd;
}

// out [head] += 16 weights . V tile.
inline void add_values(const Cache<bf16>& v, const bf16* tile, const float* weights, float* out) {
    for (int d = 0; d < v.head; d += LANES) {
        v16f acc = load(out + d);
        for (int key = 0; key < KEYS; key += 2) {
            const v16u pair = read<v16u>(tile + (key / 2 * v.head + d) * 2);
            acc += (v16f)(pair << 16) * splat(weights[key]);
            acc += (v16f)(pair & 0xffff0000u) * splat(weights[key + 1]);
        }
        store(out + d, acc);
    }
}
inline void add_values(const Cache<float>& v, const float* tile, const float* weights, float* out) {
    for (int d = 0; d < v.head; d += LANES) {
        v16f acc = load(out + d);
        for (int key = 0; key < KEYS; key++) acc += load(tile + key * v.head + d) * splat(weights[key]);
        store(out + d, acc);
    }
}

// One row's running softmax state.
struct Row {
    int position;
    float maximum = -3.0e38f, total = 0;
};

// Scores [SPLIT] of keys from `first` -> weights in place; returns the factor for what was summed before.
inline float online_softmax(float* s, int first, float scale, Row& row) {
    const int visible = row.position - first + 1;  // keys of this split that the row may see
    float top = row.maximum;
    v16f part[SPLIT / LANES];
    for (int i = 0; i < SPLIT / LANES; i++) {
        const v16i seen = counted() < splat(visible - i * LANES);
        part[i] = select(seen, load(s + i * LANES) * splat(scale), splat(-3.0e38f));
        const float here = max_of(part[i]);
        top = here > top ? here : top;
    }
    v16f added{};
    for (int i = 0; i < SPLIT / LANES; i++) {
        const v16f weight = vexp(part[i] - splat(top));
        store(s + i * LANES, weight);
        added += weight;
    }
    const float factor = vexp(splat(row.maximum - top))[0];
    row.total = row.total * factor + sum(added);
    row.maximum = top;
    return factor;
}

struct Paging {
    const int32_t* table;  // this sequence's pages
    int page_size;
    int64_t tile(int key) const {
        return (int64_t(table[key / page_size]) * page_size + key % page_size) / KEYS;
    }
};

// `count` rows: q rows and positions, out [count][head] fp32. `scratch`: SPLIT floats.
template <typename T>
void attend_wide(const Cache<T>& k, const Cache<T>& v, int group, const Paging& paging, const T* const* q, Row* rows,
                 int count, float scale, float* out, float* s) {
    for (int r = 0; r < count; r++) {
        float* own = out + r * k.head;
        memset(own, 0, sizeof(float) * k.head);
        for (int first = 0; first <= rows[r].position; first += SPLIT) {
            int tiles = 0;
            for (int key = first; key < first + SPLIT && key <= rows[r].position; key += KEYS, tiles++)
                store(s + tiles * KEYS, scores(k, k.tile(paging.tile(key), group), q[r]));
            const float factor = online_softmax(s, first, scale, rows[r]);
            for (int d = 0; d < k.head; d += LANES) store(own + d, load(own + d) * splat(factor));
            for (int i = 0; i < tiles; i++)
                add_values(v, v.tile(paging.tile(first + i * KEYS), group), s + i * KEYS, own);
        }
        const v16f inverse = splat(1.0f / rows[r].total);
        for (int d = 0; d < k.head; d += LANES) store(own + d, load(own + d) * inverse);
    }
}

}  // namespace onebase
