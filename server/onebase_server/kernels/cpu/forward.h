// The whole forward pass as phases, shared by threads (schedule.h). Which thread does what changes from run to run;
// what a row's values are does not.
#pragma once

#include "attention_amx.h"
#include "lora.h"
#include "matmul_wide.h"
#include "schedule.h"
#include "workspace.h"

namespace onebase {

template <typename T, bool AMX> struct Forward {
    const Model m;  // copies: a straggling thread may look at them after the call has returned
    const Step step;
    const Workspace work;
    const int tokens, threads;
    const LoraStep lora;
    Schedule schedule;
    int units = 0;  // attention units

    Forward(const Model& model, const Step& s, int max_rank)
        : m(model), step(s), work(model, s.num_tokens, max_rank, s.threads, s.workspace), tokens(s.num_tokens),
          threads(s.threads), lora{s.lora_starts, s.lora_ranks, model.rank_table, max_rank},
          schedule(model.num_layers * 9 + 4) {
        const int per = m.heads / m.groups;
        for (int i = 0; i < step.num_seqs; i++)
            units += ((step.query_starts[i + 1] - step.query_starts[i]) * per + 15) / 16 * m.groups;
    }

    static int columns_of(int count) { return count < 16 ? count : 16; }

    // Matmul input of `count` rows: values [column, column + width) of row `row`; rounds to the compute dtype.
    void put(int row, int column, const float* values, int width, int k, int count) {
        const T* own = put_row(row, column, values, width, k);
        if (!AMX || count <= FEW) return;
        uint32_t* to = (uint32_t*)work.inputs + size_t(row / 16) * 16 * (k / 2) + size_t(column / 2) * 16 + row % 16;
        for (int i = 0; i < width / 2; i++) memcpy(to + size_t(i) * 16, own + 2 * i, 4);
    }

    // The same without packing for AMX: `pack_block` does it for 16 rows at once.
    const T* put_row(int row, int column, const float* values, int width, int k) {
        T* own = (T*)work.rows + size_t(row) * k + column;
        for (int i = 0; i < width; i += LANES) store_narrow(own + i, load(values + i));
        if (!AMX) {
            float* to = (float*)work.inputs + size_t(row) * k + column;
            for (int i = 0; i < width; i += LANES) store(to + i, load_wide(own + i));
        }
        return own;
    }

    // The matmul's input when there are `count` rows; a thread's own copy if they are few.
    const uint32_t* packed(int count, int k, int thread) {
        if (count > FEW) return (const uint32_t*)work.inputs;
        if (count == 1) return (const uint32_t*)work.rows;
        uint32_t* to = (uint32_t*)work.packed_of(thread);
#ifdef ONEBASE_AMX
        for (int block = 0; block * 16 < count; block++)
            pack_rows((const bf16*)work.rows + size_t(16 * block) * k, k, columns_of(count - 16 * block), columns_of(count), k, to + size_t(block) * 8 * k);
#endif
        return to;
    }

    // Rows [16 * block, 16 * block + 16), columns [column, column + BLOCK), when columns_of is 16.
    void pack_block(int block, int column, int k) {
#ifdef ONEBASE_AMX
        pack_rows((const bf16*)work.rows + size_t(16 * block) * k + column, k, 16, 16, BLOCK, (uint32_t*)work.inputs + size_t(block) * 8 * k + size_t(column / 2) * 16);
#else
        (void)block, (void)column, (void)k;
#endif
    }

    void norm(const float* x, const float* weight, int n, float* out) const {
        v16f squares{};
        for (int i = 0; i < n; i += LANES) squares += load(x + i) * load(x + i);
        const v16f factor = splat(1.0f / __builtin_sqrtf(sum(squares) / float(n) + m.eps));
        for (int i = 0; i < n; i += LANES) store(out + i, load(x + i) * factor * load(weight + i));
    }

    // y = x . W, and A . x for the adapters of the step.
    void project(const Linear& w, int which, const Linear* next, int thread, int& phase) {
        const int strips = padded(w.n) / STRIP;
        const int items = step.active >> which & 1 ? tokens * w.slices : 0;
        const int group = strips < 64 * threads ? 2 : 4, pieces = (strips + group - 1) / group;
        const int each = larger(1, items / (8 * threads)), shrinks = (items + each - 1) / each;
        const uint32_t* inputs = nullptr;
        schedule.run(phase, shrinks + pieces, 1, [&](int piece, int) {
            if (piece < shrinks) {
                const int end = (piece + 1) * each;
                shrink(w, m.lora_rows, (const T*)work.rows, lora, {piece * each, end < items ? end : items}, work.down);
                return;
            }
            const int first = (piece - shrinks) * group;
            if (AMX && !inputs) inputs = packed(tokens, w.k, thread);
            multiply(w, {first, first + group < strips ? first + group : strips}, inputs, thread, ahead_of(next, which, piece - shrinks, pieces));
        });
    }

    // A piece's share of the next projection's A: each adapter's rows lie elsewhere, and few tokens wait for them.
    Ahead ahead_of(const Linear* next, int which, int piece, int pieces) const {
        Ahead ahead;
        if (!next || tokens > 16 || !(step.active >> (which + 1) % 4 & 1)) return ahead;
        for (int item = piece; item < tokens * next->slices; item += pieces) {
            const int token = item / next->slices, slice = item % next->slices, start = lora.starts[token];
            const int rank = lora.rank(token, next->module + slice);
            if (!rank || (token && lora.starts[token - 1] == start)) continue;
            ahead.add((const T*)next->lora_a + (size_t(slice) * m.lora_rows + start) * next->k, sizeof(T) * rank * next->k);
        }
        return ahead;
    }

    void multiply(const Linear& w, Range strips, const uint32_t* inputs, int thread, const Ahead& ahead) {
        (void)inputs, (void)ahead;
        uint8_t* scratch = work.scratch_of(thread);
#ifdef ONEBASE_AMX
        if constexpr (AMX) {
            const Tokens x{inputs, tokens, columns_of(tokens), w.k};
            nf4_matmul_amx(w, m.code, x, strips, (bf16*)scratch, work.y, ahead);
        }
#endif
        if constexpr (!AMX)
            nf4_matmul_wide<sizeof(T) == 2>(w, m.code, (const float*)work.inputs, tokens, strips, (float*)scratch, work.y);
    }

    // Bias and LoRA of columns [column, column + width) of one token, inside `slice`.
    void finish(const Linear& w, int which, int token, int slice, int column, int width) {
        float* y = work.y + size_t(token) * row_stride(w.n) + column;
        if (w.bias)
            for (int i = 0; i < width; i += LANES) store(y + i, load(y + i) + load(w.bias + column + i));
        if (step.active >> which & 1) expand<T>(w, token, slice, column, width, lora, work.down, y);
    }

    void embed(int t, int thread) {
        const T* row = (const T*)m.embed + size_t(step.tokens[t]) * m.hidden;
        float* x = work.x + size_t(t) * m.hidden;
        for (int i = 0; i < m.hidden; i += LANES) store(x + i, load_wide(row + i));
        norm_and_put(t, m.layers[0].input_norm, thread, t, tokens);
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
    void rope(const Layer& layer, int item) {
        const Linear& w = layer.projections[QKV];
        const int per = m.heads / m.groups;
        const Cache<T> kc{(T*)layer.k_cache, m.groups, m.head}, vc{(T*)layer.v_cache, m.groups, m.head};
        const int t = item / m.groups, g = item % m.groups, position = step.positions[t];
        const int q0 = g * per * m.head, k0 = w.offsets[1] + g * m.head, v0 = w.offsets[2] + g * m.head;
        finish(w, QKV, t, 0, q0, per * m.head);
        finish(w, QKV, t, 1, k0, m.head);
        finish(w, QKV, t, 2, v0, m.head);
        float* y = work.y + size_t(t) * row_stride(w.n);
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

    // A unit is up to 16 (token, head) rows of one sequence and kv head; all units of a sequence lie together.
    void attention(const Layer& layer, int unit, int thread) {
        const int per = m.heads / m.groups;
        for (int seq = 0;; seq++) {
            const int rows = (step.query_starts[seq + 1] - step.query_starts[seq]) * per;
            const int own = (rows + 15) / 16 * m.groups;
            if (unit < own) {
                attend(layer, seq, unit % m.groups, unit / m.groups * 16, thread);
                return;
            }
            unit -= own;
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
    void residual(const Linear& w, int which, const float* next_norm, int t, int thread) {
        finish(w, which, t, 0, 0, m.hidden);
        float* x = work.x + size_t(t) * m.hidden;
        const float* y = work.y + size_t(t) * row_stride(w.n);
        for (int i = 0; i < m.hidden; i += LANES) store(x + i, load(x + i) + load(y + i));
        if (next_norm) norm_and_put(t, next_norm, thread, t, tokens);
    }

    // silu(gate) * up of 64 columns of up to 16 tokens.
    void silu(const Linear& w, int item) {
        const int chunks = m.inner / BLOCK, block = item / chunks, column = item % chunks * BLOCK;
        const bool whole = AMX && tokens > FEW;
        const int end = tokens < block * 16 + 16 ? tokens : block * 16 + 16;
        for (int t = block * 16; t < end; t++) {
            finish(w, GATE_UP, t, 0, column, BLOCK);
            finish(w, GATE_UP, t, 1, m.inner + column, BLOCK);
            float* gate = work.y + size_t(t) * row_stride(w.n) + column;
            for (int i = 0; i < BLOCK; i += LANES) {
                const v16f g = load(gate + i);
                store(gate + i, g / (splat(1.0f) + vexp(-g)) * load(gate + m.inner + i));
            }
            if (whole) put_row(t, column, gate, BLOCK, m.inner);
            else put(t, column, gate, BLOCK, m.inner, tokens);
        }
        if (whole) pack_block(block, column, m.inner);
    }

    void logits(Range strips, const uint32_t* inputs) {
        (void)inputs;
        const int samples = step.num_samples;
        const T* head = (const T*)m.lm_head;
#ifdef ONEBASE_AMX
        if constexpr (AMX) {
            const Tokens x{inputs, samples, columns_of(samples), m.hidden};
            bf16_matmul_amx(head, m.hidden, x, strips, step.logits, m.vocab);
        }
#endif
        if constexpr (!AMX)
            plain_matmul_wide(head, m.hidden, (const float*)work.inputs, samples, strips, step.logits, m.vocab);
        const int end = m.vocab / STRIP * STRIP;
        if (strips.end * STRIP < end) return;
        for (int n = end; n < m.vocab; n++)  // a vocabulary that is no multiple of 16
            for (int r = 0; r < samples; r++)
                step.logits[size_t(r) * m.vocab + n] =
                    dot(head + size_t(n) * m.hidden, (const T*)work.rows + size_t(r) * m.hidden, m.hidden);
    }

    int grain(int total) const { return larger(1, total / (8 * threads)); }

    void layer(int index, int thread, int& phase) {
        const Layer& l = m.layers[index];
        const Linear* w = l.projections;
        const float* next_norm = index + 1 < m.num_layers ? m.layers[index + 1].input_norm : nullptr;
        auto each = [&](int total, auto body) {
            schedule.run(phase, total, grain(total), [&](int begin, int end) {
                for (int i = begin; i < end; i++) body(i);
            });
        };
        project(w[QKV], QKV, &w[OUT], thread, phase);
        each(tokens * m.groups, [&](int item) { rope(l, item); });
        schedule.run(phase, units, 1, [&](int unit, int) { attention(l, unit, thread); });
        project(w[OUT], OUT, &w[GATE_UP], thread, phase);
        each(tokens, [&](int t) { residual(w[OUT], OUT, l.post_norm, t, thread); });
        project(w[GATE_UP], GATE_UP, &w[DOWN], thread, phase);
        each((tokens + 15) / 16 * (m.inner / BLOCK), [&](int item) { silu(w[GATE_UP], item); });
        project(w[DOWN], DOWN, index + 1 < m.num_layers ? &m.layers[index + 1].projections[QKV] : nullptr, thread, phase);
        each(tokens, [&](int t) { residual(w[DOWN], DOWN, next_norm, t, thread); });
    }

    void steps(int thread) {
        int phase = 0;
        schedule.run(phase, tokens, grain(tokens), [&](int begin, int end) {
            for (int t = begin; t < end; t++) embed(t, thread);
        });
        for (int i = 0; i < m.num_layers && !schedule.finished(); i++) layer(i, thread, phase);
        if (schedule.finished()) return;
        schedule.run(phase, step.num_samples, 1, [&](int r, int) {
            norm_and_put(int(step.sample_tokens[r]), m.norm, thread, r, step.num_samples);
        });
        const int strips = step.num_samples ? m.vocab / STRIP : 0;
        const uint32_t* inputs = nullptr;
        schedule.run(phase, strips, 64, [&](int begin, int end) {
            if (AMX && !inputs) inputs = packed(step.num_samples, m.hidden, thread);
            logits({begin, end}, inputs);
        });
        schedule.finish();
#ifdef ONEBASE_AMX
        if (AMX) tile_release();
#endif
    }
};

template <typename T, bool AMX> void run_forward(const Model& m, const Step& s, int max_rank) {
    auto forward = std::make_shared<Forward<T, AMX>>(m, s, max_rank);
    Pool::shared().run(s.threads, std::make_shared<const Pool::Job>([forward](int thread) { forward->steps(thread); }));
}

}  // namespace onebase
