// Batched LoRA, padding-free: each token meets only its own adapter's rank rows. Sums of a token have one fixed order.
#pragma once

#include "model.h"

namespace onebase {

inline float dot(const float* a, const float* b, int k) {
    v16f even{}, odd{};
    for (int i = 0; i < k; i += 2 * LANES) {
        even += load(a + i) * load(b + i);
        odd += load(a + i + LANES) * load(b + i + LANES);
    }
    return sum(even + odd);
}
inline float dot(const bf16* a, const bf16* b, int k) {
#if defined(__AVX512BF16__)
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int i = 0; i < k; i += 64) {
        even = _mm512_dpbf16_ps(even, (__m512bh)_mm512_loadu_si512(a + i), (__m512bh)_mm512_loadu_si512(b + i));
        odd = _mm512_dpbf16_ps(odd, (__m512bh)_mm512_loadu_si512(a + i + 32), (__m512bh)_mm512_loadu_si512(b + i + 32));
    }
    return sum((v16f)even + (v16f)odd);
#else
    v16f even{}, odd{};
    for (int i = 0; i < k; i += 2 * LANES) {
        even += load_wide(a + i) * load_wide(b + i);
        odd += load_wide(a + i + LANES) * load_wide(b + i + LANES);
    }
    return sum(even + odd);
#endif
}

// Which rank rows a token uses, and how many of them each module really fills.
struct LoraStep {
    const int32_t *starts, *ranks, *rank_table;
    int max_rank;
    int rank(int token, int module) const {
        return ranks[token] ? rank_table[starts[token] * MODULES + module] : 0;
    }
};

// down[token][slice][max_rank] = A . x for the (token, slice) items in `items`; x [T][k]. The same rows of B are fetched
// on the way: they are needed one phase later, and each adapter's lie elsewhere.
template <typename T>
void shrink(const Linear& w, int lora_rows, const T* x, const LoraStep& lora, Range items, float* down) {
    for (int item = items.begin; item < items.end; item++) {
        const int token = item / w.slices, slice = item % w.slices;
        const int rank = lora.rank(token, w.module + slice), start = lora.starts[token];
        const T* a = (const T*)w.lora_a + (size_t(slice) * lora_rows + start) * w.k;
        const T* b = (const T*)w.lora_b + size_t(start) * w.n + w.offsets[slice];
        const int width = w.offsets[slice + 1] - w.offsets[slice];
        for (int r = 0; r < rank; r++) {
            for (int i = 0; i < width; i += 64 / int(sizeof(T))) __builtin_prefetch(b + size_t(r) * w.n + i, 0, 2);
            down[size_t(item) * lora.max_rank + r] = dot(a + size_t(r) * w.k, x + size_t(token) * w.k, w.k);
        }
    }
}

// y[0:width] += B[:, column: column + width] . down, inside one slice; width a multiple of 16.
template <typename T>
void expand(const Linear& w, int token, int slice, int column, int width, const LoraStep& lora, const float* down, float* y) {
    const int rank = lora.rank(token, w.module + slice);
    if (!rank) return;
    const T* b = (const T*)w.lora_b + size_t(lora.starts[token]) * w.n + column;
    const float* own = down + (size_t(token) * w.slices + slice) * lora.max_rank;
    for (int c = 0; c < width; c += LANES) {
        v16f acc{};
        for (int r = 0; r < rank; r++) acc += load_wide(b + size_t(r) * w.n + c) * splat(own[r]);
        store(y + c, load(y + c) + acc);
    }
}

}  // namespace onebase
