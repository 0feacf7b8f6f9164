// The kernel for up to eight tokens: see nf4.cuh for layout and decoding.
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

// M <= 8, all of x in shared memory. Persistent: one CTA an SM, a job is 16 rows, its W warps take every W-th pair of
// blocks of K; each warp keeps D - 1 pairs in flight across jobs, the first ones before the previous kernel has ended.
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

#define SMALL(name, W, D)                                                                                         \
  extern "C" __global__ void __launch_bounds__(W * 32, 1)                                                      \
      name(const u8* weight, const u16* x, u16* y, const __grid_constant__ Codes codes,                               \
           const __grid_constant__ Fusion fusion, int M, int N, int K, int ldx, int KB, int tiles) {                  \
    small_kernel<W, D>(weight, x, y, codes, fusion, M, N, K, ldx, KB, tiles);                                             \
  }
