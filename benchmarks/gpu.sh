#!/usr/bin/env bash
# Everything that needs a GPU, in two parts; continues after a failure; exits 1 if one failed.
#   figures  tests, verify, run, head, sweep
#   trust    compute-sanitizer, property tests, bad calls, processes, soak
# Each part is under nine minutes: each step has a limit of its own, and is interrupted there so that it still reports.
# Usage: benchmarks/gpu.sh [options for run, head and sweep, such as --overwrite]
#   PYTHON   interpreter with pmpo_kernels[triton,test] installed, or with PYTHONPATH set to this folder's parent (default:
#            python, else python3); the C++ extension, Liger and TRL are optional
#   RESULTS  folder for logs and JSON (default: benchmarks/results/<GPU name>)
#   ARCHIVE  a .tgz file that the results are also packed into, whatever happens
#   PARTS    default "figures trust"
#   COMMIT   what is measured, for a copy of the sources without its repository: kept as commit.txt
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$(command -v python || command -v python3)}
PARTS=${PARTS:-figures trust}
unset TRITON_INTERPRET
for part in $PARTS; do
  [[ $part =~ ^(figures|trust)$ ]] || {
    echo "gpu.sh: expected PARTS of figures and trust, got $part" >&2
    exit 2
  }
done

gpu=$("$PYTHON" -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower())') || {
  echo "gpu.sh: expected a GPU visible to PyTorch, got none ($PYTHON -m pmpo_kernels info tells more)" >&2
  exit 2
}
RESULTS=${RESULTS:-benchmarks/results/$gpu}
mkdir -p "$RESULTS"
[ -z "${ARCHIVE:-}" ] || trap 'tar czf "$ARCHIVE" -C "$RESULTS" .' EXIT
[ -z "${COMMIT:-}" ] || echo "$COMMIT" >"$RESULTS/commit.txt"
failed=()
skipped=""

# step NAME SECONDS COMMAND...: run for at most SECONDS, keep the output as NAME.log, remember a failure
step() {
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  echo "== $name"
  timeout -s INT -k 10 "$seconds" "$@" 2>&1 | tee "$RESULTS/$name.log"
  local status=${PIPESTATUS[0]}
  ((status == 124 || status == 137)) && echo "$name: stopped after $seconds s" | tee -a "$RESULTS/$name.log"
  ((status == 0)) || failed+=("$name")
  echo "== $name took $((SECONDS - start)) s"
}

figures() {
  # what needs a GPU, then every other test that runs Triton's kernels but those of the other part; the rest needs no GPU
  local own=(tests/test_gpu.py tests/test_triton.py)
  local left_out=("${own[@]}" tests/test_aot.py "${trusted[@]}")
  step tests-gpu 70 "$PYTHON" -m pytest -q --durations 10 "${own[@]}"
  step tests-kernels 70 "$PYTHON" -m pytest -q --durations 10 tests -k "triton or gpu" "${left_out[@]/#/--ignore=}"
  step verify 30 "$PYTHON" -m pmpo_kernels verify
  step run 150 "$PYTHON" benchmarks/run.py --out "$RESULTS" "$@"
  step head 120 "$PYTHON" benchmarks/head.py --out "$RESULTS" --no-compile "$@"
  step sweep 40 "$PYTHON" benchmarks/sweep.py --out "$RESULTS" "$@"
}

trusted=(tests/test_{properties,property_extremes,bad_calls,fuzz_bad_calls,processes,soak}.py)
trust() {
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
      # without PyTorch's caching allocator, so that each tensor is an allocation of its own
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "sanitizer-$tool" 90 \
        compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 1 "$PYTHON" benchmarks/sanitize.py
    done
  else
    echo "== sanitizer: NOT RUN, compute-sanitizer is not on PATH (it comes with the CUDA toolkit)" |
      tee "$RESULTS/sanitizer.log"
    skipped=" (sanitizer not run)"
  fi
  step tests-trust 210 "$PYTHON" -m pytest -q --durations 10 -k "triton or gpu or thread or soak" "${trusted[@]}"
  local overwrite=()
  [[ " $* " != *" --overwrite "* ]] || overwrite=(--overwrite)
  step soak 120 "$PYTHON" benchmarks/soak.py --out "$RESULTS/soak.json" --impl triton --steps 5000 "${overwrite[@]}"
}

"$PYTHON" -m pmpo_kernels info --json >"$RESULTS/info.json" || failed+=(info)
for part in $PARTS; do "$part" "$@"; done

if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]} (logs in $RESULTS)"
  exit 1
fi
echo "all steps passed$skipped; results in $RESULTS"
