// The buffers of one forward inside one block of memory. Matmul inputs are kept twice: as rows of the compute dtype
// (LoRA reads them) and as the matmul wants them (packed pairs for AMX, fp32 rows otherwise). Few tokens are packed by each
// thread for itself: tokens share the cache lines of packed pairs, and two threads that write one line wait for each other.
#pragma once

#include "model.h"

namespace onebase {

inline int larger(int a, int b) { return a > b ? a : b; }
inline int widest_input(const Model& m) { return larger(larger(m.hidden, m.inner), m.heads * m.head); }
inline int widest_output(const Model& m) {
    return row_stride(larger((m.heads + 2 * m.groups) * m.head, larger(2 * m.inner, m.hidden)));
}

constexpr int FEW = 64;  // tokens that each thread packs for itself

struct Workspace {
    float *x, *y, *down;  // residual stream, last projection, shrunk LoRA inputs
    void *rows, *q;
    uint8_t *inputs, *packed, *scratch;
    size_t packed_each, scratch_each, bytes;

    Workspace(const Model& m, int tokens, int max_rank, int threads, uint8_t* base) {
        const size_t item = m.is_bf16 ? 2 : 4, wide = widest_input(m), round = (tokens + 15) / 16 * 16;
        size_t at = 0;
        auto take = [&](size_t n) {
            uint8_t* p = base + at;
            at += (n + 255) / 256 * 256;
            return p;
        };
        x = (float*)take(round * m.hidden * 4);
        y = (float*)take(round * widest_output(m) * 4);
        down = (float*)take(round * 3 * (max_rank + 1) * 4);
        rows = take(round * wide * item);
        q = take(round * m.heads * m.head * item);
        inputs = take(round * wide * 4);
        packed_each = ((round < FEW ? round : FEW) * wide * 2 + 255) / 256 * 256;
        packed = take(packed_each * threads);
        // The largest of: two decoded strips, wide accumulators, a tile of attention rows, a normed row.
        scratch_each = 2 * wide * STRIP * 2 + (BLOCK * LANES + round * LANES) * 4 + 16 * size_t(m.head) * 8 + 65536;
        scratch_each = (scratch_each + 255) / 256 * 256;
        scratch = take(scratch_each * threads);
        bytes = at;
    }
    uint8_t* packed_of(int thread) const { return packed + packed_each * thread; }
    uint8_t* scratch_of(int thread) const { return scratch + scratch_each * thread; }
};

}  // namespace onebase
