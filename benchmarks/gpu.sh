#!/usr/bin/env bash
# Everything that needs a GPU: tests, compute-sanitizer, verify, run, sweep. Continues after a failure; exits 1 if one failed.
# Under nine minutes: each step has a limit of its own.
# Usage: benchmarks/gpu.sh [options for run and sweep, such as --overwrite]
#   PYTHON   interpreter with pmpo_kernels[triton,test] installed (default: python); Liger and TRL are optional
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

# step NAME SECONDS COMMAND...: run for at most SECONDS, keep the output as NAME.log, remember a failure
step() {
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" 2>&1 | tee "$RESULTS/$name.log"
  local status=${PIPESTATUS[0]}
  ((status == 124)) && echo "$name: stopped after $seconds s" | tee -a "$RESULTS/$name.log"
  ((status == 0)) || failed+=("$name")
  echo "== $name took $((SECONDS - start)) s"
}

"$PYTHON" -m pmpo_kernels info --json >"$RESULTS/info.json" || failed+=(info)
# the tests that run Triton's kernels, and the large ones; the others need no GPU
step tests 150 "$PYTHON" -m pytest -q tests --ignore tests/test_aot.py -k "triton or gpu"

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    # without PyTorch's caching allocator, so that each tensor is an allocation of its own
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "sanitizer-$tool" 50 \
      compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" benchmarks/sanitize.py
  done
else
  echo "== sanitizer: NOT RUN, compute-sanitizer is not on PATH (it comes with the CUDA toolkit)" |
    tee "$RESULTS/sanitizer.log"
  skipped=" (sanitizer not run)"
fi

step verify 40 "$PYTHON" -m pmpo_kernels verify
step run 180 "$PYTHON" benchmarks/run.py --out "$RESULTS" "$@"
step sweep 60 "$PYTHON" benchmarks/sweep.py --out "$RESULTS" "$@"

if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]} (logs in $RESULTS)"
  exit 1
fi
echo "all steps passed$skipped; results in $RESULTS"
