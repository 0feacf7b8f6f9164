// y[M, N] = x[M, K] W^T for W in NF4: M = 1..128 from the tiles, larger M through `nf4_dequantise`.
//
// Weights lie in tiles of 16 rows x 64 columns, 576 bytes: 32 lanes x 16 bytes of nibbles, then absmax as float[8][2]
// (rows g, g + 8). Lane 4 g + t holds eight bytes of row g, then eight of row g + 8; byte 2 s + h has columns
// 16 s + 8 h + 2 t and + 1: the A operand of four mma.m16n8k16 (weights are A, 16 rows; tokens are B, 8 columns). A warp
// takes a tile by one coalesced 16-byte copy a lane; four row tiles (64 rows) lie together for each block of K.
// Decoding: one permute makes a shared-memory address of a byte, one load from a table of byte -> bf16 pair (a copy in
// each bank) gives two weights. absmax multiplies the block's fp32 sums, so nothing but the 16 codes is rounded.
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

// What a matmul does besides. swiglu: rows are gate and up in turns of eight, y [M, N / 2] = silu(gate) * up.
// norm (small kernel, M = 1: every CTA repeats it): x is first added to `residual` (if any; the sum goes to `total`), then
// RMS-normalised with `gain`; the result also goes to `normed` if that is not null.
struct Fusion {
  const u16* residual;
  const u16* gain;  // null: no norm
  u16* total;
  u16* normed;
  float eps;
  int swiglu;
};
