// Decode attention over paged KV: one new token a sequence. Caches [P, page_size, G, D], out [S, H D].
// Compiled for one HEAD_DIM (64, 128 or 256) and GROUP (query heads a kv head). CTA: (split of the context, kv head, sequence),
// 4 warps; HEAD_DIM / 8 lanes hold one token's head. The last split of a (sequence, head) to finish merges all in order.
#define LANES (HEAD_DIM / 8)
#define TOKENS (32 / LANES)
#define WARPS 4
#define DEPTH 4
#define NOTHING (-1e30f)

struct State { float m, l, acc[8]; };

// The softmax state of two disjoint sets of tokens (base-2 exponents).
DEV void merge(float& m, float& l, float* acc, float other_m, float other_l, const float* other_acc) {
  float top = fmaxf(m, other_m), mine = exp2f(m - top), theirs = exp2f(other_m - top);
  l = l * mine + other_l * theirs;
#pragma unroll
  for (int j = 0; j < 8; ++j) acc[j] = acc[j] * mine + other_acc[j] * theirs;
  m = top;
}

// Everything between the qkv projection and the output projection for decoding tokens: RoPE, the token's K and V into the
// cache, attention. The token's own K and V never come from the cache.
// grid (G, S, splits): splits beyond a sequence's own end last, and at once. scale includes log2(e). workspace [S, H, splits,
// HEAD_DIM + 2], counters [S, G] zero. qkv [S, (H + 2 G) D]; cos, sin fp32 [max_context, D / 2]. With cos null it is
// attention alone: qkv is q [S, H D], rotated, and all of K and V is in the cache. table_rows [S]: whose tables; null: s's.
extern "C" __global__ void __launch_bounds__(128)
    attention_decode(const u16* qkv, u16* k_cache, u16* v_cache, u16* out, const float* __restrict__ cos,
                     const float* __restrict__ sin, const long long* __restrict__ kv_slots,
                     const int* __restrict__ context_lens, const int* __restrict__ block_tables, float* workspace,
                     int* counters, const int* __restrict__ table_rows, int table_width, int page_shift, float scale, int min_chunk) {
  __shared__ float shared_m[WARPS][GROUP], shared_l[WARPS][GROUP], shared_acc[WARPS][GROUP][HEAD_DIM];
  __shared__ __align__(16) u16 fresh[(GROUP + 2) * HEAD_DIM];  // q heads, k, v: projected, not rotated
  __shared__ int arrived;
  const int kv_head = blockIdx.x, seq = blockIdx.y, split = blockIdx.z, G = gridDim.x, H = G * GROUP;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, sub = lane / LANES, d = (lane % LANES) * 8;
  launch_dependents();
  const int context = context_lens[seq];
  int chunk = (context + gridDim.z - 1) / gridDim.z;
  chunk = max((chunk + 31) / 32 * 32, min_chunk);
  const int splits = (context + chunk - 1) / chunk, begin = split * chunk, end = min(begin + chunk, cos ? context - 1 : context);
  const bool has_fresh = cos && split == splits - 1;  // its part of the context ends with the new token
  const int* table = block_tables + (u64)(table_rows ? table_rows[seq] : seq) * table_width;
  const int page_mask = (1 << page_shift) - 1;

  int base = begin + warp * TOKENS + sub;  // this lane's first token
  uint4 keys[DEPTH], values[DEPTH];
  auto load = [&]() {
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
      int token = base + i * WARPS * TOKENS;
      if (token >= end) token = begin;
      u64 row = ((u64)table[token >> page_shift] << page_shift) + (token & page_mask);
      u64 at = (row * G + kv_head) * HEAD_DIM + d;
      keys[i] = *(const uint4*)(k_cache + at);
      values[i] = *(const uint4*)(v_cache + at);
    }
  };
  // What earlier steps left in the cache is read before the previous kernel has ended.
  if (cos && split < splits && begin < end) load();
  wait_for_previous();
  if (split >= splits) return;
  if (!cos) load();

  const int row_width = (cos ? H + 2 * G : H) * HEAD_DIM;
  for (int i = threadIdx.x; i < (has_fresh ? GROUP + 2 : GROUP) * LANES; i += 128) {
    const int head = i / LANES, slice = max(head - GROUP + 1, 0);
    const int at = slice == 0 ? kv_head * GROUP + head : H + (slice - 1) * G + kv_head;
    const int column = at * HEAD_DIM + i % LANES * 8;
    *(uint4*)(fresh + i * 8) = *(const uint4*)(qkv + (u64)seq * row_width + column);
  }
  __syncthreads();

  // This lane's eight dimensions, rotated: with the other half's dimensions (Llama's half-split).
  const int half = HEAD_DIM / 2, angle = (context - 1) * half + d % half;
  float c[8], s[8];
  if (cos) {
    *(float4*)c = *(const float4*)(cos + angle); *(float4*)(c + 4) = *(const float4*)(cos + angle + 4);
    *(float4*)s = *(const float4*)(sin + angle); *(float4*)(s + 4) = *(const float4*)(sin + angle + 4);
  }
  auto rotated = [&](int head, float* to) {
    float mine[8], other[8];
    unpack8(*(const uint4*)(fresh + head * HEAD_DIM + d), mine);
    if (!cos) {
#pragma unroll
      for (int j = 0; j < 8; ++j) to[j] = mine[j];
      return;
    }
    unpack8(*(const uint4*)(fresh + head * HEAD_DIM + (d < half ? d + half : d - half)), other);
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = mine[j] * c[j] + (d < half ? -other[j] : other[j]) * s[j];
    unpack8(pack8(to), to);
  };
  float query[GROUP][8], key[8];
  State state[GROUP];
#pragma unroll
  for (int h = 0; h < GROUP; ++h) {
    rotated(h, query[h]);
    state[h].m = NOTHING;
    state[h].l = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) { query[h][j] *= scale; state[h].acc[j] = 0.f; }
  }
  if (has_fresh && warp == 0) {
    rotated(GROUP, key);
    float value[8];
    const uint4 raw = *(const uint4*)(fresh + (GROUP + 1) * HEAD_DIM + d);
    unpack8(raw, value);
    const long long row = kv_slots[seq];
    if (sub == 0 && row >= 0) {
      *(uint4*)(k_cache + (row * G + kv_head) * HEAD_DIM + d) = pack8(key);
      *(uint4*)(v_cache + (row * G + kv_head) * HEAD_DIM + d) = raw;
    }
#pragma unroll
    for (int h = 0; h < GROUP; ++h) {
      float score = 0.f;
#pragma unroll
      for (int j = 0; j < 8; ++j) score = fmaf(query[h][j], key[j], score);
#pragma unroll
      for (int step = LANES / 2; step; step >>= 1) score += __shfl_xor_sync(0xffffffffu, score, step);
      if (sub == 0) {
        state[h].m = score;
        state[h].l = 1.f;
#pragma unroll
        for (int j = 0; j < 8; ++j) state[h].acc[j] = value[j];
      }
    }
  }
  for (; base - sub - warp * TOKENS < end;) {
#pragma unroll
    for (int h = 0; h < GROUP; ++h) {
      float score[DEPTH], top = state[h].m;
#pragma unroll
      for (int i = 0; i < DEPTH; ++i) {
        float u[8], s = 0.f;
        unpack8(keys[i], u);
#pragma unroll
        for (int j = 0; j < 8; ++j) s = fmaf(query[h][j], u[j], s);
#pragma unroll
        for (int step = LANES / 2; step; step >>= 1) s += __shfl_xor_sync(0xffffffffu, s, step);
        score[i] = base + i * WARPS * TOKENS < end ? s : NOTHING;
        top = fmaxf(top, score[i]);
      }
      float rescale = exp2f(state[h].m - top);
      state[h].m = top;
      state[h].l *= rescale;
#pragma unroll
      for (int j = 0; j < 8; ++j) state[h].acc[j] *= rescale;
#pragma unroll
      for (int i = 0; i < DEPTH; ++i) {
        float p = score[i] == NOTHING ? 0.f : exp2f(score[i] - top), u[8];
        unpack8(values[i], u);
        state[h].l += p;
#pragma unroll
        for (int j = 0; j < 8; ++j) state[h].acc[j] = fmaf(p, u[j], state[h].acc[j]);
      }
    }
    base += DEPTH * WARPS * TOKENS;
    if (base - sub - warp * TOKENS < end) load();
  }
#pragma unroll
  for (int h = 0; h < GROUP; ++h) {
#pragma unroll
    for (int step = LANES; step < 32; step <<= 1) {
      float m = __shfl_xor_sync(0xffffffffu, state[h].m, step), l = __shfl_xor_sync(0xffffffffu, state[h].l, step);
      float acc[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) acc[j] = __shfl_xor_sync(0xffffffffu, state[h].acc[j], step);
      merge(state[h].m, state[h].l, state[h].acc, m, l, acc);
    }
    if (sub == 0) {
      shared_m[warp][h] = state[h].m;
      shared_l[warp][h] = state[h].l;
#pragma unroll
      for (int j = 0; j < 8; ++j) shared_acc[warp][h][d + j] = state[h].acc[j];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += 128) {
    const int h = i / HEAD_DIM, e = i % HEAD_DIM, head = kv_head * GROUP + h;
    float top = shared_m[0][h], l = 0.f, sum = 0.f;
#pragma unroll
    for (int w = 1; w < WARPS; ++w) top = fmaxf(top, shared_m[w][h]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      float f = exp2f(shared_m[w][h] - top);
      l += shared_l[w][h] * f;
      sum += shared_acc[w][h][e] * f;
    }
    if (splits == 1) {
      out[((u64)seq * H + head) * HEAD_DIM + e] = to_bf16(sum / l);
    } else {
      float* part = workspace + (((u64)seq * H + head) * gridDim.z + split) * (HEAD_DIM + 2);
      __stcg(part + e, sum);
      if (e == 0) { __stcg(part + HEAD_DIM, top); __stcg(part + HEAD_DIM + 1, l); }
    }
  }
  if (splits == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    arrived = atomicAdd(counters + seq * G + kv_head, 1);
    __threadfence();
  }
  __syncthreads();
  if (arrived != splits - 1) return;
  if (threadIdx.x == 0) counters[seq * G + kv_head] = 0;
  for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += 128) {
    const int h = i / HEAD_DIM, e = i % HEAD_DIM, head = kv_head * GROUP + h;
    const float* parts = workspace + ((u64)seq * H + head) * gridDim.z * (HEAD_DIM + 2);
    float top = NOTHING, l = 0.f, sum = 0.f;
    for (int s = 0; s < splits; ++s) top = fmaxf(top, __ldcg(parts + s * (HEAD_DIM + 2) + HEAD_DIM));
    for (int s = 0; s < splits; ++s) {
      const float* part = parts + s * (HEAD_DIM + 2);
      float f = exp2f(__ldcg(part + HEAD_DIM) - top);
      l += __ldcg(part + HEAD_DIM + 1) * f;
      sum += __ldcg(part + e) * f;
    }
    out[((u64)seq * H + head) * HEAD_DIM + e] = to_bf16(sum / l);
  }
}
