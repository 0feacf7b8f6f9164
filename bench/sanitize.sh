#!/bin/sh
# compute-sanitizer over a few of the kernel tests on this GPU: memory accesses, then races in shared memory. Some three
# minutes. Exit code 0: no errors found and every test passed. PY picks the interpreter, SANITIZER the tool.
#   sh bench/sanitize.sh [memcheck] [racecheck] [synccheck] [initcheck]
set -u
cd "$(dirname "$0")/.."
PY=${PY:-python3}
SANITIZER=${SANITIZER:-$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)}
[ -n "$SANITIZER" ] || { echo "compute-sanitizer was not found: it is in the CUDA toolkit; or set SANITIZER" >&2; exit 2; }
export PYTHONPATH="core:server:tests${PYTHONPATH:+:$PYTHONPATH}"
# Each tensor in an allocation of its own: in torch's large blocks a step over the end would hit a neighbour and pass.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

NF4=tests/gpu/test_nf4_matmul.py LORA=tests/gpu/test_lora.py STEP=tests/gpu/test_step_kernels.py DRAW=tests/gpu/test_draw_tokens.py
FEW="
$NF4::test_every_variant_equals_fp64_and_itself[24-64]
$NF4::test_swiglu_in_the_epilogue_equals_fp64[64-1]
$NF4::test_swiglu_in_the_epilogue_equals_fp64[64-40]
$LORA::test_equals_fp64_for_mixed_adapters[576-offsets1-7]
$LORA::test_equals_fp64_for_mixed_adapters[576-offsets1-150]
$STEP::test_norms_equal_the_twin[576]
$STEP::test_the_fused_decode_step_equals_its_parts[9-3-64]
$STEP::test_rope_and_kv_write_equal_the_twin[9-3-64]
$STEP::test_silu_mul_equals_fp64
$DRAW::test_kernel_draws_what_the_formula_draws[768]
"
MORE="
$NF4::test_every_variant_equals_fp64_and_itself[960-576]
$NF4::test_rows_of_a_wider_tensor_are_read_in_place
$NF4::test_many_tokens_go_through_the_dequantised_weight[129]
$NF4::test_norm_inside_the_matmul_equals_its_parts[True-1]
$LORA::test_equals_fp64_for_mixed_adapters[4096-offsets0-32]
$STEP::test_decode_attention_equals_the_twin[16-8-1-128]
$DRAW::test_kernel_draws_what_the_formula_draws[32000]
"
OURS="" # only our kernels are instrumented, so that torch's own take no time
for name in nf4_ lora_ attention_decode rms_norm rope_write_kv silu_mul advance_step draw_tokens; do
  OURS="$OURS --kernel-name kns=$name"
done

[ $# -gt 0 ] || set -- memcheck racecheck
status=0
for tool in "$@"; do
  tests=$FEW
  [ "$tool" = memcheck ] && tests="$FEW $MORE"
  echo "== $tool"
  # shellcheck disable=SC2086 - lists of words
  "$SANITIZER" --tool "$tool" --target-processes application-only --launch-timeout 60 --print-limit 20 \
    --error-exitcode 9 $OURS "$PY" -m pytest -q -p no:cacheprovider -p no:xdist $tests || status=$?
done
exit $status
