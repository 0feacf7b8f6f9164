// What Python calls (ctypes, plain C): enabling AMX, sizes, the whole forward, and single operations for the tests.
#include "forward.h"
#include "sample.h"
#include "unpack.h"

#if defined(__linux__) && defined(ONEBASE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace onebase;

namespace {

// Tokens [count][k] in bf16 -> blocks of pairs, for the matmul on its own.
void pack(const bf16* x, int count, int k, uint32_t* out) {
    const int columns = count < 16 ? count : 16;
    for (int t = 0; t < count; t++)
        for (int i = 0; i < k / 2; i++)
            memcpy(&out[(size_t(t / columns) * (k / 2) + i) * columns + t % columns], x + size_t(t) * k + 2 * i, 4);
}

int max_rank_of(const Step& s) {
    int rank = 0;
    for (int t = 0; t < s.num_tokens; t++) rank = s.lora_ranks[t] > rank ? s.lora_ranks[t] : rank;
    return rank;
}

}  // namespace

extern "C" {

// Sizes of the structs, for Python to compare with its own.
void onebase_sizes(int32_t* out) {
    out[0] = sizeof(Linear), out[1] = sizeof(Layer), out[2] = sizeof(Model), out[3] = sizeof(Step), out[4] = sizeof(Draw);
}

// 1 if this build has AMX and the kernel lets this process use it.
int onebase_enable_amx() {
#if defined(__linux__) && defined(ONEBASE_AMX)
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
#else
    return 0;
#endif
}

int64_t onebase_workspace_bytes(const Model* m, int tokens, int max_rank, int threads) {
    return int64_t(Workspace(*m, tokens, max_rank, threads, nullptr).bytes);
}

void onebase_forward(const Model* m, const Step* s) {
    const int rank = max_rank_of(*s);
#ifdef ONEBASE_AMX
    if (m->use_amx && m->is_bf16) {
        run_forward<bf16, true>(*m, *s, rank);
        return;
    }
#endif
    if (m->is_bf16) run_forward<bf16, false>(*m, *s, rank);
    else run_forward<float, false>(*m, *s, rank);
}

// tokens[r] drawn from logits [rows][vocab] by draws[r].
void onebase_sample(const float* logits, int rows, int vocab, const Draw* draws, int threads, int32_t* tokens) {
    auto schedule = std::make_shared<Schedule>(1);
    Pool::shared().run(rows < threads ? rows : threads, std::make_shared<const Pool::Job>([=](int) {
        int phase = 0;
        RowSampler sampler;
        schedule->run(phase, rows, 1, [&](int r, int) { tokens[r] = sampler.draw(logits + size_t(r) * vocab, vocab, draws[r]); });
    }));
}

// y [count][row_stride(n)] fp32 = x [count][k] . W on one thread; x bf16 for AMX, fp32 otherwise (already rounded if
// `round`).
void onebase_nf4_matmul(const Linear* w, const float* code, const void* x, int count, int use_amx, int round, uint8_t* scratch, float* y) {
    const Range strips{0, padded(w->n) / STRIP};
#ifdef ONEBASE_AMX
    if (use_amx) {
        const int columns = columns_for(count), blocks = (count + columns - 1) / columns;
        std::unique_ptr<uint32_t[]> packed(new uint32_t[size_t(blocks) * columns * (w->k / 2)]());
        pack((const bf16*)x, count, w->k, packed.get());
        nf4_matmul_amx(*w, code, Tokens{packed.get(), count, columns, w->k}, strips, (bf16*)scratch, y);
        tile_release();
    }
#endif
    if (!use_amx && round) nf4_matmul_wide<true>(*w, code, (const float*)x, count, strips, (float*)scratch, y);
    if (!use_amx && !round) nf4_matmul_wide<false>(*w, code, (const float*)x, count, strips, (float*)scratch, y);
}

// out [count][k] = rows [first, first + count) of a repacked weight, in fp32 or rounded to bf16. For training processes,
// which map the strips of a server and load this library by its path: the signature is a contract with them.
void onebase_unpack(const uint8_t* data, const float* code, int first, int count, int k, int amx, int is_bf16, int threads, void* out) {
    auto schedule = std::make_shared<Schedule>(1);
    Pool::shared().run(size_t(count) * k >> 18 ? threads : 1, std::make_shared<const Pool::Job>([=](int) {
        int phase = 0;
        schedule->run(phase, count, 64, [&](int begin, int end) {
            const size_t at = size_t(begin) * k;
            if (is_bf16) unpack_rows(data, code, first + begin, end - begin, k, amx, (bf16*)out + at);
            else unpack_rows(data, code, first + begin, end - begin, k, amx, (float*)out + at);
        });
    }));
}

}  // extern "C"
