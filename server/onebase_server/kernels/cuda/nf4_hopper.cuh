// The kernel for up to 128 tokens on Hopper: wgmma with the weights decoded into registers. After wgmma.cuh.
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
