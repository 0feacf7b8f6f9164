// The whole forward pass as phases of one parallel region, a barrier between phases. What a thread does in a phase
// depends on the number of threads; what a row's values are does not.
#pragma once

#include <atomic>

#include "attention_amx.h"
#include "lora.h"
#include "matmul_wide.h"

namespace onebase {

inline int widest_input(const Model& m) {
    const int a = m.hidden > m.inner ? m.hidden : m.inner;
    return a > m.heads * m.head ? a : m.heads * m.head;
}
inline int widest_output(const Model& m) {
    const int qkv = (m.heads + 2 * m.groups) * m.head, gate_up = 2 * m.inner;
    return padded(qkv > gate_up ? qkv : gate_up);
}
inline size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Buffers inside one block of memory; `bytes` of them are needed. Matmul inputs are kept twice: as rows of the
// compute dtype (LoRA reads them) and as the matmul wants them (packed pairs, or fp32 rows).
struct Workspace {
    float *x, *y, *down;
    void *rows, *q;
    uint8_t *inputs, *scratch;
    size_t scratch_each, bytes;

    Workspace(const Model& m, int tokens, int max_rank, int threads, uint8_t* base) {
        const size_t item = m.is_bf16 ? 2 : 4, wide = widest_input(m);
        const size_t round = (tokens + 15) / 16 * 16;
        size_t at = 0;
        auto take = [&](size_t n) { uint8_t* p = base + at; at += aligned(n); return p; };
        x = (float*)take(round * m.hidden * 4);
        y = (float*)take(round * widest_output(m) * 4);
        down = (float*)take(round * 3 * (max_rank + 1) * 4);
        rows = take(round * wide * item);
        q = take(round * m.heads * m.head * item);
        inputs = take(round * wide * 4);
        const size_t strips = 2 * wide * STRIP * 2, accumulators = (BLOCK * LANES + round * LANES) * 4;
        const size_t attention = 16 * MAX_HEAD * 6 + 4096;
        scratch_each = aligned((strips > accumulators ? strips : accumulators) + 32768 + attention);
        scratch = take(scratch_each * threads);
        bytes = at;
    }
    uint8_t* scratch_of(int thread) const { return scratch + scratch_each * thread; }
    static constexpr int MAX_HEAD = 256;
};

template <typename T, bool AMX> struct Forward {
    const Model& m;
    const Step& step;
    const Workspace work;
    const int tokens, threads;
    const LoraStep lora;
    std::atomic<int> next_unit{0};
    int units = 0;  // attention units

    Forward(const Model& model, const Step& s, int max_rank)
        : m(model), step(s), work(model, s.num_tokens, max_rank, s.threads, s.workspace), tokens(s.num_tokens),
          threads(s.threads), lora{s.lora_starts, s.lora_ranks, model.rank_table, max_rank} {
        const int per = m.heads / m.groups;
        for (int i = 0; i < step.num_seqs; i++)
            units += ((step.query_starts[i + 1] - step.query_starts[i]) * per + 15) / 16 * m.groups;
    }

    // Matmul input of `count` rows: values [column, column + width) of row `row`; rounds to the compute dtype.
    void put(int row, int column, const float* values, int width, int k, int count) {
        T* own = (T*)work.rows + size_t(row) * k + column;
        for (int i = 0; i < width; i += LANES) store_narrow(own + i, load(values + i));
        if (AMX) {
            const int columns = columns_of(count);
            uint32_t* to = (uint32_t*)work.inputs + size_t(row / columns) * columns * (k / 2);
            const uint32_t* pairs = (const uint32_t*)own;
            for (int i = 0; i < width / 2; i++) to[size_t(column / 2 + i) * columns + row % columns] = pairs[i];
        } else {
            float* to = (float*)work.inputs + size_t(row) * k + column;
            for (int i = 0; i < width; i += LANES) store(to + i, load_wide(own + i));
        }
    }
    static int columns_of(int count) { return count < 16 ? count : 16; }

    void norm(const float* x, const float* weight, int n, float* out) const {
        v16f squares{};
        for (int i = 0; i < n; i += LANES) squares += load(x + i) * load(x + i);
        const v16f factor = splat(1.0f / __builtin_sqrtf(sum(squares) / float(n) + m.eps));
        for (int i = 0; i < n; i += LANES) store(out + i, load(x + i) * factor * load(weight + i));
    }

    // y = x . W for this thread's strips, and its share of A . x.
    void project(const Linear& w, int which, int thread) {
        const Range strips = share(padded(w.n) / STRIP, thread, threads);
        uint8_t* scratch = work.scratch_of(thread);
#ifdef ONEBASE_AMX
        if constexpr (AMX) {
            const Tokens x{(const uint32_t*)work.inputs, tokens, columns_of(tokens), w.k};
            nf4_matmul_amx(w, m.code, x, strips, (bf16*)scratch, work.y);
        }
#endif
        if constexpr (!AMX)
            nf4_matmul_wide<sizeof(T) == 2>(w, m.code, (const float*)work.inputs, tokens, strips, (float*)scratch, work.y);
        if (step.active >> which & 1)
            shrink(w, m.lora_rows, (const T*)work.rows, lora, share(tokens * w.slices * lora.max_rank, thread, threads), work.down);
    }

    // Bias and LoRA of columns [column, column + width) of one token, inside `slice`.
    void finish(const Linear& w, int which, int token, int slice, int column, int width) {
        float* y = work.y + size_t(token) * padded(w.n) + column;
        if (w.bias)
            for (int i = 0; i < width; i += LANES) store(y + i, load(y + i) + load(w.bias + column + i));
        if (step.active >> which & 1) expand<T>(w, token, slice, column, width, lora, work.down, y);
    }

    void embed(int thread) {
        const Range own = share(tokens, thread, threads);
        for (int t = own.begin; t < own.end; t++) {
            const T* row = (const T*)m.embed + size_t(step.tokens[t]) * m.hidden;
            float* x = work.x + size_t(t) * m.hidden;
            for (int i = 0; i < m.hidden; i += LANES) store(x + i, load_wide(row + i));
            norm_and_put(t, m.layers[0].input_norm, thread, t, tokens);
        }
    }

    void norm_and_put(int token, const float* weight, int thread, int row, int count) {
        float* normed = (float*)work.scratch_of(thread);
        norm(work.x + size_t(token) * m.hidden, weight, m.hidden, normed);
        put(row, 0, normed, m.hidden, m.hidden, count);
    }

    void rotate(float* v, int position) const {
        const int half = m.head / 2;
        const float *cos = m.cos + size_t(position) * half, *sin = m.sin + size_t(position) * half;
        for (int i = 0; i < half; i += LANES) {
            const v16f a = load(v + i), b = load(v + half + i), c = load(cos + i), s = load(sin + i);
            store(v + i, a * c - b * s);
            store(v + half + i, b * c + a * s);
        }
    }

    // The last token that a sequence writes in this step, if the step also wrote its tile's first key.
    bool opens_tile(int t) const {
        const int start = step.query_starts[step.seqs[t]], end = step.query_starts[step.seqs[t] + 1];
        return t + 1 == end && end - start > step.positions[t] % KEYS;
    }

    // Bias, LoRA, norms and rotation of q and k; k and v into the cache.
    void rope(const Layer& layer, int thread) {
        const Linear& w = layer.projections[QKV];
        const int per = m.heads / m.groups;
        const Cache<T> kc{(T*)layer.k_cache, m.groups, m.head}, vc{(T*)layer.v_cache, m.groups, m.head};
        const Range own = share(tokens * m.groups, thread, threads);
        for (int item = own.begin; item < own.end; item++) {
            const int t = item / m.groups, g = item % m.groups, position = step.positions[t];
            const int q0 = g * per * m.head, k0 = w.offsets[1] + g * m.head, v0 = w.offsets[2] + g * m.head;
            finish(w, QKV, t, 0, q0, per * m.head);
            finish(w, QKV, t, 1, k0, m.head);
            finish(w, QKV, t, 2, v0, m.head);
            float* y = work.y + size_t(t) * padded(w.n);
            for (int h = 0; h < per; h++) {
                float* q = y + q0 + h * m.head;
                if (layer.q_norm) norm(q, layer.q_norm, m.head, q);
                rotate(q, position);
                T* to = (T*)work.q + (size_t(t) * m.heads + g * per + h) * m.head;
                for (int i = 0; i < m.head; i += LANES) store_narrow(to + i, load(q + i));
            }
            if (layer.k_norm) norm(y + k0, layer.k_norm, m.head, y + k0);
            rotate(y + k0, position);
            write_key(kc, step.kv_slots[t], g, y + k0);
            write_value(vc, step.kv_slots[t], g, y + v0);
            if (opens_tile(t)) clear_after(vc, step.kv_slots[t], g);
        }
    }

    // Units are taken from a shared counter: contexts differ in length. All units of a sequence lie together.
    void attention(const Layer& layer, int thread) {
        const int per = m.heads / m.groups;
        int seq = 0, before = 0;
        for (int unit; (unit = next_unit.fetch_add(1)) < units;) {
            for (;; seq++) {
                const int rows = (step.query_starts[seq + 1] - step.query_starts[seq]) * per;
                const int own = (rows + 15) / 16 * m.groups;
                if (unit < before + own) break;
                before += own;
            }
            const int local = unit - before;
            attend(layer, seq, local % m.groups, local / m.groups * 16, thread);
        }
    }

    void attend(const Layer& layer, int seq, int g, int first_row, int thread) {
        const int per = m.heads / m.groups, start = step.query_starts[seq];
        const int all = (step.query_starts[seq + 1] - start) * per;
        const int count = all - first_row < 16 ? all - first_row : 16;
        const Cache<T> kc{(T*)layer.k_cache, m.groups, m.head}, vc{(T*)layer.v_cache, m.groups, m.head};
        const Paging paging{step.block_tables + size_t(seq) * step.table_width, m.page_size};
        float* out = (float*)work.scratch_of(thread);
        T* gathered = (T*)(out + 16 * m.head);
        const T* q[16] = {};
        Row rows[16];
        for (int r = 0; r < count; r++) {
            const int t = start + (first_row + r) / per, h = g * per + (first_row + r) % per;
            rows[r].position = step.positions[t];
            q[r] = (const T*)work.q + (size_t(t) * m.heads + h) * m.head;
            if (AMX) memcpy(gathered + r * m.head, q[r], sizeof(T) * m.head);
        }
#ifdef ONEBASE_AMX
        if constexpr (AMX)
            attend_amx(kc, vc, g, paging, gathered, m.head, rows, count, m.scale, out);
#endif
        if constexpr (!AMX)
            attend_wide<T>(kc, vc, g, paging, q, rows, count, m.scale, out, (float*)(gathered + 16 * m.head));
        for (int r = 0; r < count; r++) {
            const int t = start + (first_row + r) / per, h = g * per + (first_row + r) % per;
            put(t, h * m.head, out + r * m.head, m.head, m.heads * m.head, tokens);
        }
    }

    // x += y, then the next norm.
    void residual(const Linear& w, int which, const float* next_norm, int thread) {
        const Range own = share(tokens, thread, threads);
        for (int t = own.begin; t < own.end; t++) {
            finish(w, which, t, 0, 0, m.hidden);
            float* x = work.x + size_t(t) * m.hidden;
            const float* y = work.y + size_t(t) * padded(w.n);
            for (int i = 0; i < m.hidden; i += LANES) store(x + i, load(x + i) + load(y + i));
            if (next_norm) norm_and_put(t, next_norm, thread, t, tokens);
        }
    }

    void silu(const Layer& layer, int thread) {
        const Linear& w = layer.projections[GATE_UP];
        const int width = BLOCK, chunks = m.inner / width;
        const Range own = share(tokens * chunks, thread, threads);
        for (int item = own.begin; item < own.end; item++) {
            const int t = item / chunks, column = item % chunks * width;
            finish(w, GATE_UP, t, 0, column, width);
            finish(w, GATE_UP, t, 1, m.inner + column, width);
            float* gate = work.y + size_t(t) * padded(w.n) + column;
            for (int i = 0; i < width; i += LANES) {
                const v16f g = load(gate + i);
                store(gate + i, g / (splat(1.0f) + vexp(-g)) * load(gate + m.inner + i));
            }
            put(t, column, gate, width, m.inner, tokens);
        }
    }

    void logits(int thread) {
        const int samples = step.num_samples, whole = m.vocab / STRIP;
        const Range strips = share(whole, thread, threads);
        const T* head = (const T*)m.lm_head;
#ifdef ONEBASE_AMX
        if constexpr (AMX) {
            const Tokens x{(const uint32_t*)work.inputs, samples, columns_of(samples), m.hidden};
            bf16_matmul_amx(head, m.hidden, x, strips, step.logits, m.vocab);
        }
#endif
        if constexpr (!AMX)
            plain_matmul_wide(head, m.hidden, (const float*)work.inputs, samples, strips, step.logits, m.vocab);
        if (thread == 0)
            for (int n = whole * STRIP; n < m.vocab; n++)
                for (int r = 0; r < samples; r++)
                    step.logits[size_t(r) * m.vocab + n] =
                        dot(head + size_t(n) * m.hidden, (const T*)work.rows + size_t(r) * m.hidden, m.hidden);
    }

    void layer(int index, int thread) {
        const Layer& l = m.layers[index];
        const Linear* w = l.projections;
        project(w[QKV], QKV, thread);
#pragma omp barrier
        rope(l, thread);
        if (thread == 0) next_unit = 0;
#pragma omp barrier
        attention(l, thread);
#pragma omp barrier
        project(w[OUT], OUT, thread);
#pragma omp barrier
        residual(w[OUT], OUT, l.post_norm, thread);
#pragma omp barrier
        project(w[GATE_UP], GATE_UP, thread);
#pragma omp barrier
        silu(l, thread);
#pragma omp barrier
        project(w[DOWN], DOWN, thread);
#pragma omp barrier
        residual(w[DOWN], DOWN, index + 1 < m.num_layers ? m.layers[index + 1].input_norm : nullptr, thread);
#pragma omp barrier
    }

    void run() {
#pragma omp parallel num_threads(threads)
        {
            const int thread = omp_get_thread_num();
            embed(thread);
#pragma omp barrier
            for (int i = 0; i < m.num_layers; i++) layer(i, thread);
            const Range own = share(step.num_samples, thread, threads);
            for (int r = own.begin; r < own.end; r++)
                norm_and_put(int(step.sample_tokens[r]), m.norm, thread, r, step.num_samples);
#pragma omp barrier
            if (step.num_samples) logits(thread);
#ifdef ONEBASE_AMX
            if (AMX) _tile_release();
#endif
        }
    }
};

}  // namespace onebase
