// The small operations between the matmuls: RMSNorm (with the residual sum), RoPE + KV write, silu(gate) * up.
// All read and write 16 bytes a thread; rounding follows transformers' Llama (the normalised value and the
// residual sum are rounded to bf16 before their next use).

// One CTA of 512 threads a token, K <= 16384, K a multiple of 8. `residual` may be null; then `sum_out` is unused.
extern "C" __global__ void __launch_bounds__(512)
    rms_norm(const u16* x, const u16* residual, const u16* __restrict__ weight,
             u16* out, u16* sum_out, int K, float eps) {
  __shared__ float parts[16];
  const int token = blockIdx.x, chunks = K / 8, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  launch_dependents();
  wait_for_previous();
  uint4 kept[4];
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int c = threadIdx.x + 512 * i;
    if (c >= chunks) break;
    float u[8];
    uint4 raw = *(const uint4*)(x + (u64)token * K + c * 8);
    unpack8(raw, u);
    if (residual) {
      float w[8];
      unpack8(*(const uint4*)(residual + (u64)token * K + c * 8), w);
#pragma unroll
      for (int j = 0; j < 8; ++j) u[j] += w[j];
      raw = pack8(u);
      unpack8(raw, u);
      *(uint4*)(sum_out + (u64)token * K + c * 8) = raw;
    }
    kept[i] = raw;
#pragma unroll
    for (int j = 0; j < 8; ++j) squares = fmaf(u[j], u[j], squares);
  }
  squares = warp_sum(squares);
  if (lane == 0) parts[warp] = squares;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < 16; ++i) total += parts[i];
  const float scale = rsqrtf(total / K + eps);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int c = threadIdx.x + 512 * i;
    if (c >= chunks) break;
    float u[8], w[8];
    unpack8(kept[i], u);
    unpack8(*(const uint4*)(weight + c * 8), w);
#pragma unroll
    for (int j = 0; j < 8; ++j) u[j] *= scale;
    unpack8(pack8(u), u);
#pragma unroll
    for (int j = 0; j < 8; ++j) u[j] *= w[j];
    *(uint4*)(out + (u64)token * K + c * 8) = pack8(u);
  }
}

// qkv [T, (H + 2G) D] -> q_out [T, H, D] rotated; k rotated and v into the caches at row kv_slots[token] (of G D values); a
// negative row is not written. cos, sin fp32 [max_context, D / 2]. grid (ceil(items / 256), T), items = (H + G) D / 16 + G D / 8.
extern "C" __global__ void __launch_bounds__(256)
    rope_write_kv(const u16* qkv, const float* __restrict__ cos, const float* __restrict__ sin,
                  u16* q_out, u16* k_cache, u16* v_cache,
                  const int* __restrict__ positions, const long long* __restrict__ kv_slots, int H, int G, int D) {
  const int token = blockIdx.y, per_head = D / 16, rotations = (H + G) * per_head, half = D / 2;
  int item = blockIdx.x * 256 + threadIdx.x;
  launch_dependents();
  const long long row = kv_slots[token];
  const int position = positions[token];
  wait_for_previous();
  const u16* from = qkv + (u64)token * (H + 2 * G) * D;
  if (item >= rotations) {
    item -= rotations;
    if (item < G * D / 8 && row >= 0)
      *(uint4*)(v_cache + row * G * D + item * 8) = *(const uint4*)(from + (H + G) * D + item * 8);
    return;
  }
  const int head = item / per_head, d = (item - head * per_head) * 8;
  float low[8], high[8], c[8], s[8], new_low[8], new_high[8];
  unpack8(*(const uint4*)(from + head * D + d), low);
  unpack8(*(const uint4*)(from + head * D + half + d), high);
  const float4* cs = (const float4*)(cos + (u64)position * half + d);
  const float4* ss = (const float4*)(sin + (u64)position * half + d);
  *(float4*)c = cs[0]; *(float4*)(c + 4) = cs[1];
  *(float4*)s = ss[0]; *(float4*)(s + 4) = ss[1];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    new_low[j] = low[j] * c[j] - high[j] * s[j];
    new_high[j] = high[j] * c[j] + low[j] * s[j];
  }
  u16* to;
  if (head < H) {
    to = q_out + ((u64)token * H + head) * D;
  } else {
    if (row < 0) return;
    to = k_cache + (row * G + head - H) * D;
  }
  *(uint4*)(to + d) = pack8(new_low);
  *(uint4*)(to + half + d) = pack8(new_high);
}

// gate_up [T, 2F] -> [T, F]; F a multiple of 8. `folded`: gate and up in turns of eight columns.
extern "C" __global__ void __launch_bounds__(256)
    silu_mul(const u16* gate_up, u16* out, int F, int folded) {
  const int token = blockIdx.y, column = (blockIdx.x * 256 + threadIdx.x) * 8;
  launch_dependents();
  wait_for_previous();
  if (column >= F) return;
  float gate[8], up[8];
  const u16* from = gate_up + (u64)token * 2 * F + (folded ? column * 2 : column);
  unpack8(*(const uint4*)from, gate);
  unpack8(*(const uint4*)(from + (folded ? 8 : F)), up);
#pragma unroll
  for (int j = 0; j < 8; ++j) gate[j] = swiglu(gate[j], up[j]);
  *(uint4*)(out + (u64)token * F + column) = pack8(gate);
}

// The step after a greedy one whose pages suffice: chosen tokens become inputs, everything moves on by one. Padding stays.
extern "C" __global__ void __launch_bounds__(256)
    advance_step(int* tokens, const long long* chosen, int* positions, int* context_lens, long long* kv_slots, int count) {
  const int i = threadIdx.x;
  launch_dependents();
  wait_for_previous();
  if (i >= count || context_lens[i] == 0) return;
  tokens[i] = (int)chosen[i];
  positions[i] += 1;
  context_lens[i] += 1;
  if (kv_slots[i] >= 0) kv_slots[i] += 1;
}
