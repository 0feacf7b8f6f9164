// The kernel for up to 128 tokens with mma.sync, for GPUs that are not Hopper.
// M <= 8 NT. CTA: WN x WK warps, a warp R row tiles, WN warps share a 64-column block of x, WK blocks a step. Stream-K:
// all (row block, step) units are cut into equal runs, one a CTA; a row block that several CTAs share is summed by the last
// to arrive, always in the same order. D stages in flight. KB is a multiple of 4.
template <int NT, int R, int WN, int WK, int D>
DEV void wide_kernel(const u8* __restrict__ weight, const u16* x, u16* y, const Codes& codes,
                     float* workspace, int* counters, int M, int N, int K, int ldx, int KB,
                     int tiles) {
  constexpr int THREADS = WN * WK * 32, BN = WN * R * 16, MP = NT * 8;
  constexpr int X_BYTES = MP * 144, W_BYTES = R * TILE, STAGE = WK * X_BYTES + WN * WK * W_BYTES;
  extern __shared__ __align__(1024) u8 smem[];
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  const int kg = warp / WN, wn = warp - kg * WN, group_tid = tid - kg * WN * 32;
  const u8* lut = smem;
  u8* ring = smem + LUT_BYTES;
  int* arrived = (int*)(ring + D * STAGE);
  float* shared_sums = (float*)(ring + D * STAGE + 16);  // [R * NT * 4][WN * 32], only if WK > 1
  launch_dependents();

  const int steps = KB / WK, row_blocks = (tiles * 16 + BN - 1) / BN, units = row_blocks * steps;
  const int first = (int)((u64)blockIdx.x * units / gridDim.x), last = (int)((u64)(blockIdx.x + 1) * units / gridDim.x);

  auto issue_weights = [&](int unit, int slot) {
    if (unit >= last) return;
    int rb = unit / steps, kb = (unit - rb * steps) * WK + kg;
    u8* to = ring + slot * STAGE + WK * X_BYTES + warp * W_BYTES;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      int tile = min((rb * WN + wn) * R + r, tiles - 1);
      copy_tile(to + r * TILE, weight + tile_offset(tile, kb, KB), lane);
    }
  };
  auto issue_x = [&](int unit, int slot) {
    if (unit >= last) return;
    int column = ((unit % steps) * WK + kg) * 64;
    u8* to = ring + slot * STAGE + kg * X_BYTES;
#pragma unroll
    for (int i = group_tid; i < MP * 8; i += WN * 32) {
      int row = i >> 3, chunk = i & 7;
      bool valid = row < M && column + chunk * 8 < K;
      copy16_or_zero(to + row * 144 + chunk * 16, valid ? x + (u64)row * ldx + column + chunk * 8 : x, valid);
    }
  };
  for (int i = 0; i < D - 1; ++i) { issue_weights(first + i, i); copy_commit(); }
  build_table(smem, codes, tid, THREADS);
  wait_for_previous();
  for (int i = 0; i < D - 1; ++i) { issue_x(first + i, i); copy_commit(); }
  __syncthreads();

  const u32 lane4 = lane * 4;
  float acc[R][NT][4] = {};
  int slot = 0, start = first % steps;
  for (int unit = first; unit < last; ++unit) {
    copy_wait<D - 2>();
    group_barrier<WN * 32>(1 + kg);
    {
      int free_slot = slot == 0 ? D - 1 : slot - 1;
      issue_weights(unit + D - 1, free_slot);
      issue_x(unit + D - 1, free_slot);
      copy_commit();
    }
    const u8* stage = ring + slot * STAGE;
    const u8* tile = stage + WK * X_BYTES + warp * W_BYTES;
    u32 a[R][16];
    float2 absmax[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      uint4 w = *(const uint4*)(tile + r * TILE + lane * 16);
      absmax[r] = *(const float2*)(tile + r * TILE + 512 + g * 8);
      decode_tile(lut, w, lane4, a[r]);
    }
    const u32 my_x = shared_address(stage + kg * X_BYTES + (lane & 7) * 144 + (lane >> 3) * 16);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      uint4 b0 = load_matrices(my_x + n * 8 * 144), b1 = load_matrices(my_x + n * 8 * 144 + 64);
#pragma unroll
      for (int r = 0; r < R; ++r) tile_product(acc[r][n], a[r], b0, b1, absmax[r]);
    }
    slot = slot == D - 1 ? 0 : slot + 1;

    const int rb = unit / steps, step = unit - rb * steps;
    if (step != steps - 1 && unit != last - 1) continue;
    // The row block (or this CTA's part of it) is done: sum over the WK groups, in order WK-1, ..., 0.
    if (WK > 1) {
      __syncthreads();  // a group that ran ahead must not overwrite sums of the row block before
#pragma unroll
      for (int from = WK - 1; from > 0; --from) {
        if (kg != from && kg != from - 1) continue;
        float* pair = shared_sums + group_tid;
#pragma unroll
        for (int i = 0; i < R * NT * 4; ++i)
          if (kg == from) pair[i * WN * 32] = acc[i / (NT * 4)][i / 4 % NT][i % 4];
        group_barrier<WN * 64>(WK + from);
#pragma unroll
        for (int i = 0; i < R * NT * 4; ++i)
          if (kg == from - 1) acc[i / (NT * 4)][i / 4 % NT][i % 4] += pair[i * WN * 32];
        group_barrier<WN * 64>(WK + from);
      }
    }
    const bool whole = start == 0 && step == steps - 1;
    const int row0 = rb * BN;
    if (kg == 0) {
      float* part = workspace + (u64)(blockIdx.x * 2 + (start == 0 ? 1 : 0)) * BN * MP;
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            int row = (wn * R + r) * 16 + g + (c >> 1) * 8, token = n * 8 + 2 * t + (c & 1);
            if (whole) {
              if (token < M && row0 + row < N) y[(u64)token * N + row0 + row] = to_bf16(acc[r][n][c]);
            } else {
              __stcg(part + token * BN + row, acc[r][n][c]);
            }
          }
    }
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[r][n][c] = 0.f;
    if (!whole) {
      // Which CTAs share this row block: those whose runs meet [rb * steps, (rb + 1) * steps).
      auto owner = [&](int u) { return (int)(((u64)(u + 1) * gridDim.x - 1) / units); };
      const int from = owner(rb * steps), to = owner(rb * steps + steps - 1);
      __threadfence();
      __syncthreads();
      if (tid == 0) {
        *arrived = atomicAdd(counters + rb, 1);
        __threadfence();
      }
      __syncthreads();
      if (*arrived == to - from) {
        if (tid == 0) counters[rb] = 0;
        for (int i = tid; i < M * (BN / 4); i += THREADS) {
          int token = i / (BN / 4), row = (i - token * (BN / 4)) * 4;
          float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
          for (int cta = from; cta <= to; ++cta) {
            int begin = (int)((u64)cta * units / gridDim.x);
            const float* part = workspace + (u64)(cta * 2 + (begin <= rb * steps ? 1 : 0)) * BN * MP;
            float4 v = __ldcg((const float4*)(part + token * BN + row));
            sum.x += v.x; sum.y += v.y; sum.z += v.z; sum.w += v.w;
          }
          if (row0 + row < N)  // N is a multiple of 4 (checked at load)
            *(uint2*)(y + (u64)token * N + row0 + row) = make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
        }
      }
      __syncthreads();
    }
    start = 0;
  }
  copy_wait<0>();
}

#define WIDE(name, NT, R, WN, WK, D)                                                                           \
  extern "C" __global__ void __launch_bounds__(WN * WK * 32, 1)                                                \
      name(const u8* weight, const u16* x, u16* y, const __grid_constant__ Codes codes, float* workspace, int* counters, int M, int N, \
           int K, int ldx, int KB, int tiles) {                                                                \
    wide_kernel<NT, R, WN, WK, D>(weight, x, y, codes, workspace, counters, M, N, K, ldx, KB, tiles);          \
  }
