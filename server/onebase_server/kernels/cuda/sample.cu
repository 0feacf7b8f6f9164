// One token a row of logits: the most likely where the temperature is 0, else a draw by the inverse CDF over the vocabulary in
// id order, as engine/sampler.py does: weights exp((logit - max) / temperature) and their sums in fp64, the first token
// whose running sum exceeds uniform * total. Sums are always added in the same order. grid (rows), 1024 threads, a run of ids each.
extern "C" __global__ void __launch_bounds__(1024)
    draw_tokens(const u16* logits, const double* temperatures, const double* uniforms, long long* chosen, int V) {
  __shared__ float warp_top[32];
  __shared__ int warp_id[32];
  __shared__ double warp_sums[32];
  const int row = blockIdx.x, tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int run = (V + 1023) / 1024, begin = min(tid * run, V), end = min(begin + run, V);
  launch_dependents();
  wait_for_previous();
  const u16* mine = logits + (u64)row * V;

  float top = -__int_as_float(0x7f800000);
  int id = V;
  for (int i = begin; i < end; ++i) {
    float value = bf16_float(mine[i]);
    if (value > top) { top = value; id = i; }
  }
#pragma unroll
  for (int step = 16; step; step >>= 1) {
    float other = __shfl_xor_sync(0xffffffffu, top, step);
    int other_id = __shfl_xor_sync(0xffffffffu, id, step);
    if (other > top || (other == top && other_id < id)) { top = other; id = other_id; }
  }
  if (lane == 0) { warp_top[warp] = top; warp_id[warp] = id; }
  __syncthreads();
  top = warp_top[0];
  id = warp_id[0];
  for (int w = 1; w < 32; ++w)
    if (warp_top[w] > top || (warp_top[w] == top && warp_id[w] < id)) { top = warp_top[w]; id = warp_id[w]; }
  if (id >= V) id = 0;  // nothing but NaN

  const double temperature = temperatures[row];
  if (tid == 0) chosen[row] = id;
  if (!(temperature > 0.)) return;
  double sum = 0.;
  for (int i = begin; i < end; ++i) sum += exp(((double)bf16_float(mine[i]) - (double)top) / temperature);
  double upto = sum;  // of this warp's lanes up to this one
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    double before = __shfl_up_sync(0xffffffffu, upto, step);
    if (lane >= step) upto += before;
  }
  if (lane == 31) warp_sums[warp] = upto;
  __syncthreads();
  double base = 0., total = 0.;
  for (int w = 0; w < 32; ++w) {
    if (w == warp) base = total;
    total += warp_sums[w];
  }
  // [from, to) of neighbouring threads meet exactly, so that one thread has the target.
  const double before = __shfl_up_sync(0xffffffffu, upto, 1);
  const double from = lane == 0 ? base : base + before, to = base + upto, target = uniforms[row] * total;
  if (from <= target && target < to) {
    double running = from;
    int picked = -1;
    for (int i = begin; i < end; ++i) {
      double weight = exp(((double)bf16_float(mine[i]) - (double)top) / temperature);
      if (weight <= 0.) continue;
      picked = i;
      running += weight;
      if (running > target) break;
    }
    if (picked >= 0) chosen[row] = picked;
  }
}
