#!/usr/bin/env bash
# Everything that needs a GPU: tests, compute-sanitizer, verify, bench, run. Continues after a failure; exits 1 if one failed.
# Usage: benchmarks/gpu.sh [options for bench and run, such as --overwrite]
#   PYTHON   interpreter with pmpo_kernels[triton,test] installed (default: python)
#   RESULTS  folder for logs and JSON (default: benchmarks/results/<GPU name>)
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
unset TRITON_INTERPRET

gpu=$("$PYTHON" -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower())' 2>/dev/null) || {
  echo "gpu.sh: expected a GPU visible to PyTorch, got none ($PYTHON -m pmpo_kernels info tells more)" >&2
  exit 2
}
RESULTS=${RESULTS:-benchmarks/results/$gpu}
mkdir -p "$RESULTS"
failed=()
skipped=""

# step NAME COMMAND...: run, keep the output as NAME.log, remember a failure
step() {
  local name=$1
  shift
  echo "== $name"
  "$@" 2>&1 | tee "$RESULTS/$name.log" || failed+=("$name")
}

"$PYTHON" -m pmpo_kernels info --json >"$RESULTS/info.json" || failed+=(info)
step tests "$PYTHON" -m pytest tests --ignore tests/test_aot.py

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    # without PyTorch's caching allocator, so that each tensor is an allocation of its own
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "sanitizer-$tool" \
      compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" benchmarks/sanitize.py
  done
else
  echo "== sanitizer: NOT RUN, compute-sanitizer is not on PATH (it comes with the CUDA toolkit)" |
    tee "$RESULTS/sanitizer.log"
  skipped=" (sanitizer not run)"
fi

step verify "$PYTHON" -m pmpo_kernels verify
step bench "$PYTHON" -m pmpo_kernels bench --out "$RESULTS" "$@"
step run "$PYTHON" benchmarks/run.py --out "$RESULTS" "$@"

if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]} (logs in $RESULTS)"
  exit 1
fi
echo "all steps passed$skipped; results in $RESULTS"
