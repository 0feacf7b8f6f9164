// y[M, N] = x[M, K] W^T for W in NF4: M = 1..128 from the tiles, larger M through `nf4_dequantise`.
//
// Weights lie in tiles of 16 rows x 64 columns, 576 bytes: 32 lanes x 16 bytes of nibbles, then absmax as float[8][2] (rows g,
// g + 8). Lane 4 g + t holds eight bytes of row g, then eight of row g + 8; byte 2 s + h has columns 16 s + 8 h + 2 t and + 1:
// the A operand of four mma.m16n8k16 (weights are A, 16 rows; tokens are B, 8 columns). A warp takes a tile by one
// coalesced 16-byte copy a lane; four row tiles (64 rows) lie together for each block of K. Decoding: one permute makes a shared-memory address of a byte, one load from a table of
// byte -> bf16 pair (a copy in each bank) gives two weights. absmax multiplies the block's fp32 sums, so nothing but
// the 16 codes is rounded.
#define TILE 576
#define LUT_BYTES 65536
#define QUAD (4 * TILE)

// Where a row tile's block begins; the row tile's next block is QUAD bytes on.
DEV u64 tile_offset(int tile, int block, int KB) { return ((u64)(tile >> 2) * KB + block) * QUAD + (tile & 3) * TILE; }

struct Codes { u16 v[16]; };

// Row `byte` is 256 bytes apart; 32 copies, one a bank, in its first half. Column order: the high nibble is the even column.
DEV void build_table(u8* lut, const Codes& codes, int tid, int threads) {
  for (int i = tid; i < 2048; i += threads) {
    int byte = i >> 3;
    u32 pair = (u32)codes.v[byte >> 4] | ((u32)codes.v[byte & 15] << 16);
    *(uint4*)(lut + byte * 256 + (i & 7) * 16) = make_uint4(pair, pair, pair, pair);
  }
}

template <int BYTE> DEV u32 decode_byte(const u8* lut, u32 word, u32 lane4) {
  return *(const u32*)(lut + __byte_perm(word, lane4, 0x5504 | (BYTE << 4)));
}

// 16 bytes of a lane -> the four A operands of the four 16-column steps.
DEV void decode_tile(const u8* lut, const uint4& w, u32 lane4, u32* a) {
  a[0] = decode_byte<0>(lut, w.x, lane4);  a[1] = decode_byte<0>(lut, w.z, lane4);
  a[2] = decode_byte<1>(lut, w.x, lane4);  a[3] = decode_byte<1>(lut, w.z, lane4);
  a[4] = decode_byte<2>(lut, w.x, lane4);  a[5] = decode_byte<2>(lut, w.z, lane4);
  a[6] = decode_byte<3>(lut, w.x, lane4);  a[7] = decode_byte<3>(lut, w.z, lane4);
  a[8] = decode_byte<0>(lut, w.y, lane4);  a[9] = decode_byte<0>(lut, w.w, lane4);
  a[10] = decode_byte<1>(lut, w.y, lane4); a[11] = decode_byte<1>(lut, w.w, lane4);
  a[12] = decode_byte<2>(lut, w.y, lane4); a[13] = decode_byte<2>(lut, w.w, lane4);
  a[14] = decode_byte<3>(lut, w.y, lane4); a[15] = decode_byte<3>(lut, w.w, lane4);
}

// acc += absmax * (tile x 8 tokens)
DEV void tile_product(float* acc, const u32* a, const uint4& b0, const uint4& b1, float2 absmax) {
  float c[4] = {0.f, 0.f, 0.f, 0.f};
  mma_16x8x16(c, a[0], a[1], a[2], a[3], b0.x, b0.y);
  mma_16x8x16(c, a[4], a[5], a[6], a[7], b0.z, b0.w);
  mma_16x8x16(c, a[8], a[9], a[10], a[11], b1.x, b1.y);
  mma_16x8x16(c, a[12], a[13], a[14], a[15], b1.z, b1.w);
  acc[0] = fmaf(absmax.x, c[0], acc[0]);
  acc[1] = fmaf(absmax.x, c[1], acc[1]);
  acc[2] = fmaf(absmax.y, c[2], acc[2]);
  acc[3] = fmaf(absmax.y, c[3], acc[3]);
}

DEV void copy_tile(u8* slot, const u8* tile, int lane) {
  copy16(slot + lane * 16, tile + lane * 16);
  if (lane < 4) copy16(slot + 512 + lane * 16, tile + 512 + lane * 16);
}

// What a matmul does besides. swiglu: the weight's rows are gate and up in turns of eight, y [M, N / 2] = silu(gate) * up.
// norm (small kernel, M = 1: every CTA repeats it): x is first added to `residual` (if any; the sum goes to `total`), then RMS-normalised with `gain`; the
// result also goes to `normed` if that is not null.
struct Fusion {
  const u16* residual;
  const u16* gain;  // null: no norm
  u16* total;
  u16* normed;
  float eps;
  int swiglu;
};

// M <= 8, all of x in shared memory. Persistent: one CTA an SM, a job is 16 rows, its W warps take every W-th pair of
// blocks of K; each warp keeps D - 1 pairs in flight across jobs, the first ones before the previous kernel has ended.
// One token: x + residual, its norm, into shared memory; CTA 0 writes both to memory too. Up to four chunks a thread.
template <typename Place, typename Store>
DEV void normalise(const u16* x, const Fusion& fusion, int K, int tid, int threads, float* sums, const Place& place,
                   const Store& store) {
  uint4 kept[4];
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int chunk = tid + i * threads;
    if (chunk * 8 >= K) break;
    kept[i] = *(const uint4*)(x + chunk * 8);
    float u[8];
    unpack8(kept[i], u);
    if (fusion.residual) {
      float r[8];
      unpack8(*(const uint4*)(fusion.residual + chunk * 8), r);
#pragma unroll
      for (int j = 0; j < 8; ++j) u[j] += r[j];
      kept[i] = pack8(u);
      unpack8(kept[i], u);
      if (blockIdx.x == 0) *(uint4*)(fusion.total + chunk * 8) = kept[i];
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) squares = fmaf(u[j], u[j], squares);
  }
  squares = warp_sum(squares);
  if ((tid & 31) == 0) sums[tid >> 5] = squares;
  __syncthreads();
  float total = 0.f;
  for (int w = 0; w < threads / 32; ++w) total += sums[w];
  const float scale = rsqrtf(total / K + fusion.eps);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int chunk = tid + i * threads;
    if (chunk * 8 >= K) break;
    float u[8], w[8];
    unpack8(kept[i], u);
    unpack8(*(const uint4*)(fusion.gain + chunk * 8), w);
#pragma unroll
    for (int j = 0; j < 8; ++j) u[j] = round_bf16(u[j] * scale) * w[j];
    const uint4 v = pack8(u);
    store(place(0, chunk), v);
    if (fusion.normed && blockIdx.x == 0) *(uint4*)(fusion.normed + chunk * 8) = v;
  }
}

template <int W, int D>
DEV void small_kernel(const u8* __restrict__ weight, const u16* x, u16* y, const Codes& codes, const Fusion& fusion,
                      int M, int N, int K, int ldx, int KB, int tiles) {
  extern __shared__ __align__(1024) u8 smem[];
  constexpr int STAGE = 2 * TILE, THREADS = W * 32;
  const int tid = threadIdx.x, warp = tid >> 5, lane = tid & 31, g = lane >> 2, t = lane & 3;
  const u8* lut = smem;
  u8* ring = smem + LUT_BYTES + warp * D * STAGE;
  float* sums = (float*)(smem + LUT_BYTES + W * D * STAGE);  // [2][W][M][16]
  u8* xs = (u8*)(sums + 2 * W * 16 * M);
  const int row_bytes = KB * 128 + 16;
  launch_dependents();

  const int in_job = max((KB / 2 - warp + W - 1) / W, 0);  // this warp's pairs of one job
  int left = in_job * ((tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x), to_job_end = in_job;
  int copied_job = blockIdx.x;
  const u8* source = weight + tile_offset(copied_job, 2 * warp, KB) + lane * 16;
  u8* put = ring + lane * 16;
  auto issue = [&]() {
    if (left > 0) {
      copy16(put, source);
      copy16(put + TILE, source + QUAD);
      if (lane < 8) {  // absmax of both
        const int second = lane >> 2;
        copy16(put + 512 + second * (TILE - 64), source + 512 + second * (QUAD - 64));
      }
      --left;
      source += W * 2 * QUAD;
      if (--to_job_end == 0) {
        to_job_end = in_job;
        copied_job += gridDim.x;
        source = weight + tile_offset(copied_job, 2 * warp, KB) + lane * 16;
      }
    }
    copy_commit();
    put += STAGE;
    if (put >= ring + D * STAGE) put -= D * STAGE;
  };
  for (int i = 0; i < D - 1; ++i) issue();
  build_table(smem, codes, tid, THREADS);
  wait_for_previous();
  // Inside a block, lane t's columns are made contiguous: pair t of 16-byte chunk c goes to 32 t + 4 c.
  auto place = [&](int row, int chunk) { return xs + row * row_bytes + (chunk >> 3) * 128 + (chunk & 7) * 4; };
  auto store = [&](u8* to, const uint4& v) {
    *(u32*)to = v.x;
    *(u32*)(to + 32) = v.y;
    *(u32*)(to + 64) = v.z;
    *(u32*)(to + 96) = v.w;
  };
  if (fusion.gain) {
    normalise(x, fusion, K, tid, THREADS, sums, place, store);
    for (int chunk = K / 8 + tid; chunk < KB * 8; chunk += THREADS) store(place(0, chunk), make_uint4(0, 0, 0, 0));
  } else {
#pragma unroll 4
    for (int i = tid; i < M * KB * 8; i += THREADS) {
      const int row = i / (KB * 8), chunk = i - row * (KB * 8);
      uint4 v = make_uint4(0, 0, 0, 0);
      if (chunk * 8 < K) v = *(const uint4*)(x + (u64)row * ldx + chunk * 8);
      store(place(row, chunk), v);
    }
  }
  __syncthreads();

  const u32 lane4 = lane * 4;
  const u8* my_x = xs + g * row_bytes + t * 32;
  const u8* take = ring;
  int parity = 0;
  for (int job = blockIdx.x; job < tiles; job += gridDim.x) {
    float acc[4] = {0.f, 0.f, 0.f, 0.f};
    for (int pair = warp; pair < KB / 2; pair += W) {
      copy_wait<D - 2>();
      __syncwarp();
      issue();
      uint4 b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = make_uint4(0, 0, 0, 0);
      if (g < M) {
        const uint4* from = (const uint4*)(my_x + pair * 256);
        b[0] = from[0]; b[1] = from[1]; b[2] = from[8]; b[3] = from[9];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        u32 a[16];
        decode_tile(lut, *(const uint4*)(take + i * TILE + lane * 16), lane4, a);
        tile_product(acc, a, b[2 * i], b[2 * i + 1], *(const float2*)(take + i * TILE + 512 + g * 8));
      }
      take += STAGE;
      if (take == ring + D * STAGE) take = ring;
    }
    float* mine = sums + (parity * W + warp) * M * 16;
    if (2 * t < M) { mine[2 * t * 16 + g] = acc[0]; mine[2 * t * 16 + g + 8] = acc[2]; }
    if (2 * t + 1 < M) { mine[(2 * t + 1) * 16 + g] = acc[1]; mine[(2 * t + 1) * 16 + g + 8] = acc[3]; }
    __syncthreads();
    if (tid < (16 * M + 31) / 32 * 32) {  // whole warps
      const int i = min(tid, 16 * M - 1), row = tid < 16 * M ? job * 16 + (i & 15) : N, token = i >> 4;
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < W; ++w) sum += sums[(parity * W + w) * M * 16 + i];
      if (fusion.swiglu) {
        const float up = __shfl_down_sync(0xffffffffu, sum, 8);
        if ((i & 15) < 8 && row < N)
          y[(u64)token * (N / 2) + job * 8 + (i & 7)] = to_bf16(swiglu(round_bf16(sum), round_bf16(up)));
      } else if (row < N) {
        y[(u64)token * N + row] = to_bf16(sum);
      }
    }
    parity ^= 1;
  }
  copy_wait<0>();
}

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

#ifdef HOPPER
#define WGMMA_FENCE() asm volatile("wgmma.fence.sync.aligned;" ::: "memory")
#define WGMMA_COMMIT() asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory")
#define WGMMA_WAIT() asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory")

DEV u64 descriptor(u32 low) {  // address / 16; 1024 bytes between groups of eight tokens, 128-byte swizzle
  u64 out;
  asm("mov.b64 %0, {%1, %2};" : "=l"(out) : "r"(low | 0x10000u), "r"(0x40000040u));
  return out;
}

// Tokens as B of wgmma, from shared memory: up to N. WR x WK warpgroups of 64 rows: WR of them share a block of x, WK share the
// blocks of a stage, B each. Stream-K as above, but the CTA that begins a row block ends it: it runs to it last, when
// the others' parts (their first work) are long written. All CTAs are resident: grid <= SMs. One more warp asks the
// bulk copy engine for what comes, D stages ahead; warpgroups run free of one another, so that one multiplies while
// another decodes. In a warpgroup: wgmma of one block || decoding of the next; then absmax.
template <int N, int WR, int WK, int B, int D>
DEV void wg_kernel(const u8* __restrict__ weight, const TensorMap& x, u16* y, const Codes& codes, float* partials,
                   int* flags, int M, int rows, int KB, int tiles, int fuse_swiglu) {
  constexpr int GROUPS = WR * WK, CONSUMERS = GROUPS * 128, GROUP = WR * 128, SUMS = N / 2;
  constexpr int X_BYTES = N * 128, W_BYTES = B * QUAD;
  constexpr int STAGE = (WK * B * X_BYTES + GROUPS * W_BYTES + 1023) / 1024 * 1024;
  extern __shared__ __align__(1024) u8 smem[];
  const int tid = threadIdx.x, warp = __shfl_sync(0xffffffffu, tid >> 5, 0), lane = tid & 31, g = lane >> 2, t = lane & 3;
  u8* ring = smem + LUT_BYTES;
  const u32 ring_address = shared_address(ring), full = ring_address + D * STAGE, empty = full + D * 8;
  float* shared_sums = (float*)(ring + D * STAGE + 1024);  // [SUMS][GROUP], only if WK > 1
  launch_dependents();

  const int quads = (tiles + 3) / 4, steps = KB / (WK * B), row_blocks = (quads + WR - 1) / WR, units = row_blocks * steps;
  const int first = (int)((u64)blockIdx.x * units / gridDim.x), last = (int)((u64)(blockIdx.x + 1) * units / gridDim.x);
  int rb = first / steps, step = first - rb * steps;
  if (tid < D) {
    barrier_init(full + tid * 8, 1);
    barrier_init(empty + tid * 8, GROUPS * 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  // Registers move from the copying warpgroup to those that compute.
  constexpr int POOL = 65536 / ((GROUPS + 1) * 128) / 8 * 8 * (GROUPS + 1) * 128;
  constexpr int MINE = (POOL - 32 * 128) / CONSUMERS / 8 * 8;
  if (warp >= GROUPS * 4) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    if (warp == GROUPS * 4 && lane == 0) {
      auto issue_weights = [&](int slot, int block, int at) {
        u32 bytes = 0;
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) {
          const int quad = block * WR + i % WR, kb = (at * WK + i / WR) * B;
          if (quad >= quads) continue;
          bulk_copy(ring_address + slot * STAGE + WK * B * X_BYTES + i * W_BYTES, weight + ((u64)quad * KB + kb) * QUAD,
                    W_BYTES, full + slot * 8);
          bytes += W_BYTES;
        }
        return bytes;
      };
      auto issue_x = [&](int slot, int at) {
#pragma unroll
        for (int i = 0; i < WK * B; ++i)
          bulk_copy_box(ring_address + slot * STAGE + i * X_BYTES, x, (at * WK * B + i) * 64, 0, full + slot * 8);
      };
      const int ahead = min(D, last - first);
      int x_step = step;
      for (int i = 0; i < ahead; ++i) {
        barrier_expect(full + i * 8, issue_weights(i, rb, step));
        if (++step == steps) { step = 0; ++rb; }
      }
      wait_for_previous();
      for (int i = 0; i < ahead; ++i) {
        barrier_arrive_expect(full + i * 8, WK * B * X_BYTES);
        issue_x(i, x_step);
        if (++x_step == steps) x_step = 0;
      }
      int slot = 0;
      u32 parity = 0;
      for (int unit = first + D; unit < last; ++unit) {
        barrier_wait(empty + slot * 8, parity);
        barrier_expect(full + slot * 8, issue_weights(slot, rb, step));
        barrier_arrive_expect(full + slot * 8, WK * B * X_BYTES);
        issue_x(slot, step);
        if (++step == steps) { step = 0; ++rb; }
        if (++slot == D) { slot = 0; parity ^= 1; }
      }
    }
  } else {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MINE > 232 ? 232 : MINE));
  const int group = warp >> 2, quarter = warp & 3, kg = group / WR, wr = group % WR, group_tid = tid - kg * GROUP;
  build_table(smem, codes, tid, CONSUMERS);
  wait_for_previous();
  group_barrier<CONSUMERS>(14);
  const u32 lane4 = lane * 4, my_x = (ring_address + kg * B * X_BYTES) >> 4;
  const u8* my_tile = ring + WK * B * X_BYTES + group * W_BYTES + quarter * TILE;
  const u8* my_nibbles = my_tile + lane * 16;
  const u8* my_absmax = my_tile + 512 + g * 8;
  float acc[SUMS] = {}, sums[SUMS] = {};
  // Operands of two consecutive blocks, in registers of their own: one set is read while the other is written.
  u32 even[16], odd[16];
  float2 even_absmax, odd_absmax;
  int slot = 0, to_come = last - first - 1;
  u32 parity = 0;
  bool began = step == 0;
  barrier_wait(full, 0);
  decode_tile(smem, *(const uint4*)my_nibbles, lane4, even);
  even_absmax = *(const float2*)my_absmax;

  auto multiply = [&](int block, const u32* a, float2 absmax, u32* decoded, float2& next_absmax) {
    const u32 b = my_x + (slot * STAGE + block * X_BYTES) / 16;
    WGMMA_FENCE();
#pragma unroll
    for (int s = 0; s < 4; ++s) Wgmma<N>::run(sums, a + 4 * s, descriptor(b + 2 * s), s > 0);
    WGMMA_COMMIT();
    int next = slot * STAGE + (block + 1) * QUAD;
    const u32 done = empty + slot * 8;
    if (block == B - 1) {
      if (++slot == D) { slot = 0; parity ^= 1; }
      next = slot * STAGE;
      if (to_come > 0) barrier_wait(full + slot * 8, parity);
      --to_come;
    }
    decode_tile(smem, *(const uint4*)(my_nibbles + next), lane4, decoded);
    next_absmax = *(const float2*)(my_absmax + next);
    WGMMA_WAIT();
    if (block == B - 1 && lane == 0) barrier_arrive(done);
#pragma unroll
    for (int i = 0; i < SUMS; ++i) acc[i] = fmaf(i & 2 ? absmax.y : absmax.x, sums[i], acc[i]);
  };
  auto finish_step = [&](int unit) {
    const bool ends = step == steps - 1;
    if (ends || unit == last - 1) {
      if (WK > 1) {
        group_barrier<CONSUMERS>(14);  // a group that ran ahead must not overwrite sums of the row block before
#pragma unroll
        for (int from = WK - 1; from > 0; --from) {
          if (kg != from && kg != from - 1) continue;
          float* pair = shared_sums + group_tid;
#pragma unroll
          for (int i = 0; i < SUMS; ++i)
            if (kg == from) pair[i * GROUP] = acc[i];
          group_barrier<GROUP * 2>(WK + from);
#pragma unroll
          for (int i = 0; i < SUMS; ++i)
            if (kg == from - 1) acc[i] += pair[i * GROUP];
          group_barrier<GROUP * 2>(WK + from);
        }
      }
      if (kg == 0) {
        if (!began) {
          float* part = partials + (u64)blockIdx.x * (SUMS * GROUP) + group_tid;
#pragma unroll
          for (int i = 0; i < SUMS; ++i) __stcg(part + i * GROUP, acc[i]);
          __threadfence();
          group_barrier<GROUP>(15);
          if (group_tid == 0) asm volatile("st.release.gpu.u32 [%0], 1;" ::"l"(flags + blockIdx.x) : "memory");
        } else {
          if (!ends) {
            const int to = (int)(((u64)(rb + 1) * steps * gridDim.x - 1) / units);  // the CTA of the row block's last unit
            for (int cta = blockIdx.x + 1; cta <= to; ++cta) {
              if (lane == 0) {
                u32 set = 0;
                while (!set) asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(set) : "l"(flags + cta) : "memory");
              }
              __syncwarp();
              const float* part = partials + (u64)cta * (SUMS * GROUP) + group_tid;
#pragma unroll
              for (int i = 0; i < SUMS; ++i) acc[i] += __ldcg(part + i * GROUP);
            }
            group_barrier<GROUP>(15);
            for (int cta = blockIdx.x + 1 + group_tid; cta <= to; cta += GROUP) flags[cta] = 0;
          }
          // Lanes of rows g and g ^ 1 exchange, so that each stores two neighbouring rows of one token.
          const int tile = (rb * WR + wr) * 4 + quarter;
          if (fuse_swiglu) {
#pragma unroll
            for (int i = 0; i < SUMS; i += 4) {
#pragma unroll
              for (int j = 0; j < 2; ++j) acc[i + j] = swiglu(round_bf16(acc[i + j]), round_bf16(acc[i + j + 2]));
            }
          }
          const int width = fuse_swiglu ? rows / 2 : rows, row0 = tile * (fuse_swiglu ? 8 : 16) + (g & 6);
#pragma unroll
          for (int i = 0; i < SUMS; i += 2) {
            if (fuse_swiglu && (i & 2)) continue;
            const float keep = g & 1 ? acc[i + 1] : acc[i], give = g & 1 ? acc[i] : acc[i + 1];
            const float got = __shfl_xor_sync(0xffffffffu, give, 4);
            const int token = i / 4 * 8 + 2 * t + (g & 1), row = row0 + (i & 2 ? 8 : 0);
            const u32 pair = g & 1 ? pack_bf16(got, keep) : pack_bf16(keep, got);
            if (token < M && row < width) *(u32*)(y + (u64)token * width + row) = pair;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < SUMS; ++i) acc[i] = 0.f;
      began = true;
    }
    if (++step == steps) { step = 0; ++rb; }
  };
  for (int unit = first; unit < last; ++unit) {
    multiply(0, even, even_absmax, odd, odd_absmax);
    if (B == 2) {
      multiply(1, odd, odd_absmax, even, even_absmax);
    } else {
      finish_step(unit);
      if (++unit == last) break;
      multiply(0, odd, odd_absmax, even, even_absmax);
    }
    finish_step(unit);
  }
  }
}

#define WG(name, N, WR, WK, B, D)                                                                                     \
  extern "C" __global__ void __launch_bounds__((WR * WK + 1) * 128, 1)                                                \
      name(const u8* weight, const __grid_constant__ TensorMap x, u16* y, const __grid_constant__ Codes codes,        \
           float* partials, int* flags, int M, int rows, int KB, int tiles, int fuse_swiglu) {                        \
    wg_kernel<N, WR, WK, B, D>(weight, x, y, codes, partials, flags, M, rows, KB, tiles, fuse_swiglu);                \
  }
#endif

#define SMALL(name, W, D)                                                                                         \
  extern "C" __global__ void __launch_bounds__(W * 32, 1)                                                      \
      name(const u8* weight, const u16* x, u16* y, const __grid_constant__ Codes codes,                               \
           const __grid_constant__ Fusion fusion, int M, int N, int K, int ldx, int KB, int tiles) {                  \
    small_kernel<W, D>(weight, x, y, codes, fusion, M, N, K, ldx, KB, tiles);                                             \
  }
#define WIDE(name, NT, R, WN, WK, D)                                                                           \
  extern "C" __global__ void __launch_bounds__(WN * WK * 32, 1)                                                \
      name(const u8* weight, const u16* x, u16* y, const __grid_constant__ Codes codes, float* workspace, int* counters, int M, int N, \
           int K, int ldx, int KB, int tiles) {                                                                \
    wide_kernel<NT, R, WN, WK, D>(weight, x, y, codes, workspace, counters, M, N, K, ldx, KB, tiles);          \
  }

// The exact value of bitsandbytes: bf16(code * absmax), both fp32. Warp per tile; out [N, K].
extern "C" __global__ void __launch_bounds__(256)
    nf4_dequantise(const u8* __restrict__ weight, u16* __restrict__ out, const float* __restrict__ code, int N, int K,
                   int KB, int tiles) {
  __shared__ float table[16 * 32];
  for (int i = threadIdx.x; i < 512; i += 256) table[i] = code[i >> 5];
  __syncthreads();
  launch_dependents();
  wait_for_previous();
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int total = tiles * KB, stride = gridDim.x * 8;
  for (int i = blockIdx.x * 8 + (threadIdx.x >> 5); i < total; i += stride) {
    const u8* tile = weight + (u64)i * TILE;
    const int quad = i >> 2, row_group = quad / KB, row_tile = row_group * 4 + (i & 3);
    const int column = (quad - row_group * KB) * 64 + t * 8;
    float2 absmax = *(const float2*)(tile + 512 + g * 8);
    if (column >= K) continue;  // K is a multiple of 64: a block is inside or padding
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Bytes t and t + 4 of the four lanes of row g: 16-byte chunks t and t + 4 of the block.
      uint2 words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) words[j] = *(const uint2*)(tile + (g * 4 + j) * 16 + half * 8);
      const int row = row_tile * 16 + half * 8 + g;
      const float scale = half ? absmax.y : absmax.x;
      float v[2][8];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        u32 low = words[j].x >> (t * 8), high = words[j].y >> (t * 8);
        v[0][2 * j] = table[(low >> 4 & 15) * 32 + lane] * scale;
        v[0][2 * j + 1] = table[(low & 15) * 32 + lane] * scale;
        v[1][2 * j] = table[(high >> 4 & 15) * 32 + lane] * scale;
        v[1][2 * j + 1] = table[(high & 15) * 32 + lane] * scale;
      }
      if (row < N) {
        u16* to = out + (u64)row * K + column;
        *(uint4*)to = pack8(v[0]);
        *(uint4*)(to + 32) = pack8(v[1]);
      }
    }
  }
}
