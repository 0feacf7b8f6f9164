// y += (x A^T) B, each token with its own adapter: rank rows [start, start + rank) of a [I, R, K] and b [R, N]; scaling is in b.
// Slice i of a fused projection owns columns borders[i] .. borders[i + 1]. v [T, I, V] holds x A^T in fp32; only the token's own
// rank of it is written and read. Decode kernels: one CTA a token. Prefill kernels: 16 neighbouring tokens share
// the adapter's rows, once for each distinct adapter among them. Grids are sized by the pool's limits, so that a captured
// graph stays right whatever the adapters: what is beyond a token's rank returns at once.
// starts, ranks and the pools are constant during a step, so they are read before the previous kernel has ended.
#define MAX_SLICES 8
struct Borders { int v[MAX_SLICES + 1]; };

// Where eight columns lie in y: `fold` > 0 means gate and up of width `fold` in turns of eight columns (see nf4.cuh).
DEV int folded(int column, int fold) {
  if (fold == 0) return column;
  return column < fold ? column * 2 : (column - fold) * 2 + 8;
}

DEV float dot8(const uint4& a, const uint4& b, float sum) {
  float u[8], w[8];
  unpack8(a, u);
  unpack8(b, w);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(u[i], w[i], sum);
  return sum;
}

// grid (T, I, ceil(max_rank split / 8)), 8 warps: `split` (1, 2, 4 or 8) of them share a rank row.
extern "C" __global__ void __launch_bounds__(256)
    lora_shrink(const u16* x, const u16* __restrict__ a, float* v, const int* __restrict__ starts,
                const int* __restrict__ ranks, int slices, int R, int K, int ldx, int V, int split) {
  __shared__ float parts[8];
  const int token = blockIdx.x, slice = blockIdx.y, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int row = (blockIdx.z * 8 + warp) / split, chunks = K / 8;
  const int first = (warp & (split - 1)) * 32 + lane, stride = 32 * split;
  launch_dependents();
  const bool active = row < ranks[token];
  const uint4* from = (const uint4*)(a + ((u64)slice * R + starts[token] + (active ? row : 0)) * K);
  uint4 ahead[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (active && first + stride * i < chunks) ahead[i] = from[first + stride * i];
  wait_for_previous();
  if (blockIdx.z * 8 / split >= ranks[token]) return;
  const uint4* mine = (const uint4*)(x + (u64)token * ldx);
  float sum = 0.f;
  if (active) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (first + stride * i < chunks) sum = dot8(ahead[i], mine[first + stride * i], sum);
#pragma unroll 8
    for (int c = first + stride * 8; c < chunks; c += stride) sum = dot8(from[c], mine[c], sum);
  }
  sum = warp_sum(sum);
  if (split > 1) {
    if (lane == 0) parts[warp] = sum;
    __syncthreads();
    sum = 0.f;
    for (int i = 0; i < split; ++i) sum += parts[warp / split * split + i];
  }
  if (active && lane == 0 && (warp & (split - 1)) == 0) v[((u64)token * slices + slice) * V + row] = sum;
}

// grid (ceil(N / 1024), T), 128 threads of 8 columns.
extern "C" __global__ void __launch_bounds__(128)
    lora_expand(u16* y, const u16* __restrict__ b, const float* v, const int* __restrict__ starts,
                const int* __restrict__ ranks, const __grid_constant__ Borders borders, int slices, int N, int V, int fold) {
  const int token = blockIdx.y, column = (blockIdx.x * 128 + threadIdx.x) * 8;
  launch_dependents();
  const int rank = ranks[token];
  const bool active = rank > 0 && column < N;
  const u16* from = b + (u64)starts[token] * N + column;
  uint4 ahead[8];
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (active && i < rank) ahead[i] = *(const uint4*)(from + (u64)i * N);
  wait_for_previous();
  if (!active) return;
  int slice = 0;
#pragma unroll
  for (int i = 1; i < MAX_SLICES; ++i)
    if (i < slices && column >= borders.v[i]) slice = i;
  const float* mine = v + ((u64)token * slices + slice) * V;
  uint4* to = (uint4*)(y + (u64)token * N + folded(column, fold));
  float sum[8], w[8];
  unpack8(*to, sum);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < rank) {
      float s = mine[i];
      unpack8(ahead[i], w);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j] = fmaf(s, w[j], sum[j]);
    }
#pragma unroll 4
  for (int i = 8; i < rank; ++i) {
    float s = mine[i];
    unpack8(*(const uint4*)(from + (u64)i * N), w);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] = fmaf(s, w[j], sum[j]);
  }
  *to = pack8(sum);
}

// The tile's adapters: starts, ranks and, for each token, whether it is the first of its adapter.
struct TileAdapters { int start[16], rank[16], first[16]; };

DEV void read_adapters(TileAdapters& tile, const int* starts, const int* ranks, int token0, int T) {
  if (threadIdx.x < 16) {
    int token = token0 + threadIdx.x;
    tile.start[threadIdx.x] = token < T ? starts[token] : 0;
    tile.rank[threadIdx.x] = token < T ? ranks[token] : 0;
  }
  __syncthreads();
  if (threadIdx.x < 16) {
    int is_first = tile.rank[threadIdx.x] > 0;
    for (int i = 0; i < (int)threadIdx.x; ++i)
      if (tile.rank[i] > 0 && tile.start[i] == tile.start[threadIdx.x]) is_first = 0;
    tile.first[threadIdx.x] = is_first;
  }
  __syncthreads();
}

// grid (ceil(T / 16), I, ceil(max_rank / 8)), 4 warps split K in blocks of 64. mma: tokens as A, rank rows as B; columns
// inside a block are permuted alike in both (as in nf4.cuh), so that every load is 16 bytes.
extern "C" __global__ void __launch_bounds__(128)
    lora_shrink_tiles(const u16* x, const u16* __restrict__ a, float* v,
                      const int* __restrict__ starts, const int* __restrict__ ranks, int T, int slices, int R, int K,
                      int ldx, int V) {
  __shared__ TileAdapters tile;
  __shared__ float parts[4][16 * 8];
  const int token0 = blockIdx.x * 16, slice = blockIdx.y, r0 = blockIdx.z * 8;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  launch_dependents();
  wait_for_previous();
  read_adapters(tile, starts, ranks, token0, T);
  const u16* x0 = x + (u64)min(token0 + g, T - 1) * ldx + t * 16;
  const u16* x1 = x + (u64)min(token0 + g + 8, T - 1) * ldx + t * 16;
  for (int i = 0; i < 16; ++i) {
    if (!tile.first[i] || tile.rank[i] <= r0) continue;
    const u16* rows = a + ((u64)slice * R + tile.start[i] + min(r0 + g, tile.rank[i] - 1)) * K + t * 16;
    float c[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 2
    for (int k = warp * 64; k < K; k += 256) {
      uint4 p0 = *(const uint4*)(x0 + k), p1 = *(const uint4*)(x0 + k + 8);
      uint4 q0 = *(const uint4*)(x1 + k), q1 = *(const uint4*)(x1 + k + 8);
      uint4 b0 = *(const uint4*)(rows + k), b1 = *(const uint4*)(rows + k + 8);
      mma_16x8x16(c, p0.x, q0.x, p0.y, q0.y, b0.x, b0.y);
      mma_16x8x16(c, p0.z, q0.z, p0.w, q0.w, b0.z, b0.w);
      mma_16x8x16(c, p1.x, q1.x, p1.y, q1.y, b1.x, b1.y);
      mma_16x8x16(c, p1.z, q1.z, p1.w, q1.w, b1.z, b1.w);
    }
    parts[warp][g * 8 + 2 * t] = c[0];
    parts[warp][g * 8 + 2 * t + 1] = c[1];
    parts[warp][(g + 8) * 8 + 2 * t] = c[2];
    parts[warp][(g + 8) * 8 + 2 * t + 1] = c[3];
    __syncthreads();
    int row = threadIdx.x >> 3, r = threadIdx.x & 7;
    if (tile.rank[row] > r0 + r && tile.start[row] == tile.start[i])
      v[((u64)(token0 + row) * slices + slice) * V + r0 + r] =
          parts[0][threadIdx.x] + parts[1][threadIdx.x] + parts[2][threadIdx.x] + parts[3][threadIdx.x];
    __syncthreads();
  }
}

// grid (ceil(N / 1024), ceil(T / 16)), 128 threads of 8 columns x 16 tokens; ranks in chunks of 16.
extern "C" __global__ void __launch_bounds__(128)
    lora_expand_tiles(u16* y, const u16* __restrict__ b, const float* v,
                      const int* __restrict__ starts, const int* __restrict__ ranks, const __grid_constant__ Borders borders,
                      int T, int slices, int N, int V, int fold) {
  __shared__ TileAdapters tile;
  __shared__ float vs[MAX_SLICES][16][16];  // [slice][rank row][token]
  const int token0 = blockIdx.y * 16, column = (blockIdx.x * 128 + threadIdx.x) * 8;
  launch_dependents();
  wait_for_previous();
  read_adapters(tile, starts, ranks, token0, T);
  int slice = 0;
#pragma unroll
  for (int i = 1; i < MAX_SLICES; ++i)
    if (i < slices && column >= borders.v[i]) slice = i;
  float sum[16][8] = {};
  for (int i = 0; i < 16; ++i) {
    if (!tile.first[i]) continue;
    const int start = tile.start[i], rank = tile.rank[i];
    for (int r0 = 0; r0 < rank; r0 += 16) {
      __syncthreads();
      for (int j = threadIdx.x; j < slices * 256; j += 128) {
        int row = j >> 8, token = (j >> 4) & 15, r = j & 15;
        bool mine = tile.rank[token] > 0 && tile.start[token] == start && r0 + r < rank;
        vs[row][r][token] = mine ? v[((u64)(token0 + token) * slices + row) * V + r0 + r] : 0.f;
      }
      __syncthreads();
      if (column < N) {
        const int here = min(16, rank - r0);
        for (int r = 0; r < here; ++r) {
          float w[8];
          unpack8(*(const uint4*)(b + (u64)(start + r0 + r) * N + column), w);
#pragma unroll
          for (int token = 0; token < 16; ++token) {
            float s = vs[slice][r][token];
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[token][j] = fmaf(s, w[j], sum[token][j]);
          }
        }
      }
    }
  }
  if (column >= N) return;
#pragma unroll
  for (int token = 0; token < 16; ++token) {
    if (tile.rank[token] == 0) continue;
    uint4* to = (uint4*)(y + (u64)(token0 + token) * N + folded(column, fold));
    float old[8];
    unpack8(*to, old);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[token][j] += old[j];
    *to = pack8(sum[token]);
  }
}
