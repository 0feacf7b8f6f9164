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
