// The plain structs that Python fills (ctypes mirrors them field by field: kernels/cpu_abi.py).
#pragma once

#include "common.h"

namespace onebase {

struct Linear {
    const uint8_t* data;     // repacked NF4 strips: [ceil(n / 16)][k / 64][BLOCK_BYTES]
    const float* bias;       // [n] or null
    const void* lora_a;      // [slices, lora_rows, k], compute dtype, or null
    const void* lora_b;      // [lora_rows, n]
    int32_t n, k, slices, module;  // module: first of its columns in the rank table
    int32_t offsets[4];
};

enum Projection { QKV, OUT, GATE_UP, DOWN };
constexpr int MODULES = 8;  // q k v o gate up down, one spare

struct Layer {
    const float *input_norm, *post_norm, *q_norm, *k_norm;
    void *k_cache, *v_cache;
    Linear projections[4];
};

struct Model {
    const Layer* layers;
    const void* embed;       // [vocab, hidden], compute dtype
    const void* lm_head;     // [vocab, hidden], compute dtype
    const float *norm, *cos, *sin, *code;
    const int32_t* rank_table;  // [lora_rows, MODULES]: true ranks of the adapter that starts at this row
    int32_t num_layers, hidden, heads, groups, head, inner, vocab, page_size, lora_rows;
    int32_t is_bf16, use_amx, tied;
    float eps, scale;
};

struct Step {
    const int32_t *tokens, *positions, *seqs, *query_starts, *context_lens, *block_tables, *lora_starts, *lora_ranks;
    const int64_t *kv_slots, *sample_tokens;
    float* logits;           // [samples, vocab]
    uint8_t* workspace;
    int32_t num_tokens, num_seqs, table_width, num_samples, active, threads;  // active: bit a projection
};

inline int padded(int n) { return (n + STRIP - 1) / STRIP * STRIP; }
// Floats between two tokens of a projection: a little more than its width, so that rows do not share cache sets.
inline int row_stride(int n) { return padded(n) + STRIP; }

}  // namespace onebase
