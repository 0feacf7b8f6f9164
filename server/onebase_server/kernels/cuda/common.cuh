// Shared by every kernel of this folder: types, bf16 without headers (NVRTC has no include path), asynchronous copies,
// programmatic dependent launch. Legend: T/M tokens, N out features, K in features.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEV __device__ __forceinline__

DEV float lo_bf16(u32 pair) { return __uint_as_float(pair << 16); }
DEV float hi_bf16(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
DEV float bf16_float(u16 v) { return __uint_as_float((u32)v << 16); }

// Round to nearest even, `low` in the lower half.
DEV u32 pack_bf16(float low, float high) {
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
DEV u16 to_bf16(float v) { return (u16)pack_bf16(v, 0.f); }

DEV void unpack8(const uint4& v, float* out) {
  out[0] = lo_bf16(v.x); out[1] = hi_bf16(v.x);
  out[2] = lo_bf16(v.y); out[3] = hi_bf16(v.y);
  out[4] = lo_bf16(v.z); out[5] = hi_bf16(v.z);
  out[6] = lo_bf16(v.w); out[7] = hi_bf16(v.w);
}
DEV uint4 pack8(const float* v) {
  return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

// silu(gate) * up
DEV float swiglu(float gate, float up) { return gate / (1.f + __expf(-gate)) * up; }
DEV float round_bf16(float v) { return bf16_float(to_bf16(v)); }

DEV u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEV void copy16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// Zeros instead of the source where `valid` is false.
DEV void copy16_or_zero(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
DEV void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEV void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// mbarriers and the bulk copy engine (Hopper and newer). Bulk copies need no proxy fence before wgmma reads them, and a
// fence would wait for all of the thread's cp.async copies in flight.
DEV void barrier_init(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEV void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEV void barrier_arrive_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEV void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEV void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{.reg .pred p;\nWAIT_%=:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra WAIT_%=;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
DEV void bulk_copy(u32 shared, const void* global, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}
struct __align__(64) TensorMap { u64 words[16]; };
DEV void bulk_copy_box(u32 shared, const TensorMap& map, int column, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

template <int THREADS> DEV void group_barrier(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}

// Programmatic dependent launch (what an earlier kernel of the step wrote must not be `const __restrict__`: the compiler may
// move such loads above the wait): the next kernel may start now (it waits before it reads what this one writes) ...
DEV void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// ... and here this kernel waits for the one before it. Every kernel waits, so that completion is transitive.
DEV void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEV void mma_16x8x16(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of bf16: lane l gives the address of row l % 8 of matrix l / 8.
DEV uint4 load_matrices(u32 address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

DEV float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step; step >>= 1) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}
