#!/usr/bin/env bash
# Everything that needs a GPU, in calls of at most 585 s: what decides most comes first, each step has a limit of its own, and an
# archive of all results is renewed after each step, so that whatever ends the call costs the step under way at most.
#   benchmarks/gpu.sh                                  the first call: every step but racecheck and soak
#   STEPS="prepare racecheck soak" benchmarks/gpu.sh   the second call
#   DRY=1 benchmarks/gpu.sh                            a rehearsal of every step without a GPU: tiny shapes, no figures
# Option: --overwrite, replace results and archive of an earlier call.
#   PYTHON      an interpreter with torch (default: .venv/bin/python, else python, else python3)
#   RESULTS     folder for logs and JSON (default: benchmarks/results/<GPU name>; of a rehearsal out/gpu-dry)
#   ARCHIVE     .tgz file of the results (default: out/<name of RESULTS>.tgz)
#   WHEELS      folder with wheels of what is compared with, such as Liger's and TRL's, installed for this call alone
#   STEPS       names of steps, run in the order of the table below
#   LIMITS      other limits in seconds, such as "tests=300 soak=600"
#   TOTAL       seconds for the call (default 585; of a rehearsal 175)
#   KEEP_GOING  1: go on after a failed smoke test
#   COMMIT      what is measured, for a copy of the sources without its repository: kept as commit.txt
# Exits with 1 if a step failed, was cut at its limit or was not reached, with 2 for a wrong option.
set -uo pipefail
shopt -s nullglob
GRACE=5      # seconds from an interrupt to the kill; as many are kept at the end for targets and archive
DRY_LIMIT=60 # seconds of each step of a rehearsal

# The table: name, limit in seconds, command.
steps() {
  step prepare 20 bash -c prepare
  step smoke 45 "${tests[@]}" "${smoke[@]}" || return
  step stages 30 "$PYTHON" benchmarks/stages.py "${out[@]}" "${tiny_stages[@]}"
  step run 55 "$PYTHON" benchmarks/run.py --suite main "${out[@]}" "${tiny[@]}"
  step head 45 "$PYTHON" benchmarks/head.py --suite main --no-compile "${out[@]}" "${tiny_head[@]}"
  step sweep 30 "$PYTHON" benchmarks/sweep.py "${out[@]}" "${tiny_sweep[@]}"
  step cases 45 "$PYTHON" benchmarks/run.py --suite more --no-compile --repeats 5 "${out[@]}" "${tiny[@]}"
  step tests 65 "${tests[@]}" "${kernels[@]}"
  step large 20 "${alone[@]}" tests/test_gpu.py -k "$LARGE"
  step verify 15 "$PYTHON" -m pmpo_kernels verify "${tiny_verify[@]}"
  step head-more 45 "$PYTHON" benchmarks/head.py --suite more --no-compile "${out[@]}" "${tiny_head[@]}"
  step memcheck 90 bash -c 'sanitize memcheck'
  step properties 70 "${tests[@]}" "${properties[@]}"
  step racecheck 90 bash -c 'sanitize racecheck'
  step soak 60 "$PYTHON" tools/soak/soak.py "${soak[@]}" --out "$RESULTS/soak.json" "${overwrite[@]}"
}
FIRST_CALL="prepare smoke stages run head sweep cases tests large verify head-more memcheck properties"
LARGE="more_than or holds_one_chunk" # gigabytes each

arguments() { # of the commands above
  local trusted=(tests/test_{properties,property_extremes,bad_calls,fuzz_bad_calls,processes}.py)
  local left_out=(tests/test_{aot,soak}.py "${trusted[@]}") # those of other steps, and what needs no GPU
  local quick="cuda_graph or no_synchronisation or real_models or programs_a_row or products_add or triton_equals"
  tests=("$PYTHON" -m pytest -v --at-once --durations 10)
  alone=("${tests[@]}")
  smoke=(tests/test_{gpu,triton,loss,linear}.py -k "$quick or (agrees_with_float64 and triton and pmpo)")
  kernels=(tests -k "(triton or gpu) and not ($LARGE or settings_of_the_sweep)" "${left_out[@]/#/--ignore=}")
  properties=("${trusted[@]}" -k "triton or gpu or thread")
  out=(--out "$RESULTS" "${overwrite[@]}")
  soak=(--impl triton --steps 2000)
  tiny=() tiny_stages=() tiny_head=() tiny_sweep=() tiny_verify=()
  if ((DRY)); then
    smoke=(tests/test_{gpu,triton}.py -k "cuda_graph or (real_models and smollm2 and bfloat16)")
    kernels=(tests/test_triton.py -k launch_config)
    properties=("${trusted[0]}" -k ess_falls)
    soak=(--impl reference --steps 160)
    tiny=(--tiny --repeats 2 --no-compile --no-memory)
    tiny_stages=(--impl triton --tiny --repeats 1)
    tiny_head=(--tiny --repeats 2 --no-memory)
    tiny_sweep=(--vocab 600 --rows 1 --repeats 1)
    tiny_verify=(--impl reference --dtype float32 --vocab 40)
  elif "$PYTHON" -c 'import sys, importlib.util as i; sys.exit(i.find_spec("xdist") is None)'; then
    tests+=(-n 8)
  fi
}

prepare() {
  set -eo pipefail
  [ -z "$WHEELS" ] || "$PYTHON" -m pip install --no-index --no-deps --target "$PEERS" "$WHEELS"/*.whl
  if ((DRY)); then echo "stand-in for nvidia-smi: no GPU"; else nvidia-smi || echo "no nvidia-smi"; fi
  "$PYTHON" -m pmpo_kernels info --json | tee "$RESULTS/info.json"
  "$PYTHON" -c '
import torch
from pmpo_kernels.linear.projection import adds_to_float32
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
print("addmm adds bfloat16 products to a float32 sum:", adds_to_float32(device, torch.bfloat16))'
}

sanitize() { # without PyTorch's caching allocator, so that each tensor is an allocation of its own
  if ((DRY)); then
    echo "stand-in for compute-sanitizer --tool $1: the program without it"
    "$PYTHON" tools/compute_sanitizer.py --tiny
  else
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --report-api-errors no --error-exitcode 1 \
      "$PYTHON" tools/compute_sanitizer.py
  fi
}

# step NAME SECONDS COMMAND...: run for at most so many seconds and what is left of the call; the output goes to NAME.log. Fails
# where the call must not go on.
step() {
  local name=$1 limit=$2 log=$RESULTS/$1.log began=$SECONDS left=$((TOTAL - SECONDS - 2 * GRACE)) status found
  ((!DRY)) || limit=$DRY_LIMIT
  limit=${limits[$name]:-$limit}
  shift 2
  [[ " $STEPS " == *" $name "* ]] || return 0
  ((limit <= left)) || limit=$left
  if ((limit <= 0)); then
    note "$name" "not reached" 0
    return 0
  fi
  echo "== $name: at most $limit s"
  timeout -s INT -k "$GRACE" "$limit" "$@" >"$log" 2>&1 </dev/null &
  child=$!
  wait "$child"
  status=$?
  child=""
  case $status in
    0) found=passed ;;
    124 | 137) found="CUT after $limit s" ;;
    *) found="FAILED with $status" ;;
  esac
  tail -n $((status ? 30 : 8)) "$log"
  note "$name" "$found" $((SECONDS - began))
  [[ $name == smoke && $status -ne 0 && $KEEP_GOING != 1 ]] || return 0
  # what was cut before a test failed says nothing against the kernels
  [[ $found == FAILED* ]] || grep -qE "FAILED|ERROR" "$log" || return 0
  echo "== stopped: the smoke tests failed (KEEP_GOING=1 goes on)"
  return 1
}

# note NAME WHAT SECONDS: keep how a step ended, and pack everything so far
note() {
  echo "== $1: $2, $3 s"
  printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$RESULTS/steps.tsv"
  [ "$2" = passed ] || ended+=("$1: $2")
  pack
}

pack() { # whole or not at all
  tar -czf "$ARCHIVE.part" -C "$RESULTS" . && mv "$ARCHIVE.part" "$ARCHIVE"
}

finish() {
  trap '' INT TERM HUP
  trap - EXIT
  if [ -n "$child" ]; then
    kill -s INT "$child"
    wait "$child"
  fi
  [ -z "$stopped" ] || note call "stopped by $stopped" "$SECONDS"
  "$PYTHON" benchmarks/targets.py "$RESULTS" --since "$STARTED" 2>&1 | tee "$RESULTS/targets.txt"
  pack || ended+=("archive: not written")
  rm -rf "$PEERS"
  if ((${#ended[@]})); then
    printf '== %s\n' "NOT PASSED; logs are in $RESULTS, all of it in $ARCHIVE:" "${ended[@]}"
    exit 1
  fi
  echo "== all steps passed; results are in $RESULTS, packed in $ARCHIVE"
  exit 0
}

fail() {
  echo "gpu.sh: $*" >&2
  exit 2
}

DRY=${DRY:-0} KEEP_GOING=${KEEP_GOING:-0} WHEELS=${WHEELS:-} STEPS=${STEPS:-}
[[ $DRY =~ ^[01]$ ]] || fail "expected DRY of 0 or 1, got $DRY"
TOTAL=${TOTAL:-$((DRY ? 175 : 585))}
[[ $KEEP_GOING =~ ^[01]$ ]] || fail "expected KEEP_GOING of 0 or 1, got $KEEP_GOING"
[[ $TOTAL =~ ^[1-9][0-9]*$ ]] || fail "expected TOTAL in seconds, got $TOTAL"
[[ $* =~ ^(--overwrite)?$ ]] || fail "expected no option but --overwrite, got $*"
overwrite=("$@")
[[ ${PYTHON:-} != */* ]] || PYTHON=$(realpath -ms -- "$PYTHON")
for name in RESULTS ARCHIVE WHEELS; do # as seen from where the call is made
  [ -z "${!name:-}" ] || printf -v "$name" %s "$(realpath -ms -- "${!name}")"
done
cd "$(dirname "$0")/.." || exit 2

wheels=("$WHEELS"/*.whl)
[[ -z $WHEELS || ${#wheels[@]} -gt 0 ]] || fail "expected WHEELS to be a folder with .whl files, got $WHEELS"
names=$(declare -f steps | sed -n 's/^ *step \([a-z-]*\) .*/\1/p' | tr '\n' ' ')
if ((DRY)); then STEPS=${STEPS:-$names}; else STEPS=${STEPS:-$FIRST_CALL}; fi
for name in $STEPS; do
  [[ " $names " == *" $name "* ]] || fail "expected STEPS of $names, got $name"
done
declare -A limits=()
for limit in ${LIMITS:-}; do
  [[ $limit =~ ^([a-z-]+)=([1-9][0-9]*)$ && " $names " == *" ${limit%=*} "* ]] ||
    fail "expected LIMITS such as tests=300, steps being $names, got $limit"
  limits[${limit%=*}]=${limit#*=}
done

for name in .venv/bin/python python python3; do
  [ -n "${PYTHON:-}" ] || ! "$name" -c 'import torch' 2>/dev/null || PYTHON=$(command -v "$name")
done
[ -n "${PYTHON:-}" ] || fail "expected a Python interpreter with PyTorch on PATH or in PYTHON, got none"
if ((DRY)); then
  export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES="" HIP_VISIBLE_DEVICES=""
  RESULTS=${RESULTS:-$PWD/out/gpu-dry}
else
  unset TRITON_INTERPRET
  gpu=$("$PYTHON" -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower())') ||
    fail "expected a GPU visible to PyTorch, got none ($PYTHON -m pmpo_kernels info tells more; DRY=1 rehearses without one)"
  RESULTS=${RESULTS:-$PWD/benchmarks/results/$gpu}
fi
ARCHIVE=${ARCHIVE:-$PWD/out/$(basename "$RESULTS").tgz}
[[ $ARCHIVE == *.tgz && ! -d $ARCHIVE && $ARCHIVE != "$RESULTS"/* ]] ||
  fail "expected ARCHIVE to be a .tgz file outside of RESULTS ($RESULTS), got $ARCHIVE"
rehearsal=$RESULTS/REHEARSAL.txt
if ((DRY)); then
  [[ $RESULTS/ != "$PWD/benchmarks/results/"* ]] || fail "expected RESULTS of a rehearsal outside of benchmarks/results, got $RESULTS"
  other=("$RESULTS"/*)
  [[ ${#other[@]} -eq 0 || -e $rehearsal ]] || fail "expected RESULTS of a rehearsal without other files, got $RESULTS"
elif [ -e "$rehearsal" ]; then
  fail "expected RESULTS without those of a rehearsal, got $RESULTS"
fi
if ((!${#overwrite[@]})); then
  for name in $STEPS; do
    [ ! -e "$RESULTS/$name.log" ] || fail "expected RESULTS without $name.log, got $RESULTS; name another folder or give --overwrite"
  done
  [ ! -e "$ARCHIVE" ] || fail "expected a new file as ARCHIVE, got $ARCHIVE; name another one or give --overwrite"
fi

mkdir -p "$RESULTS" "$(dirname "$ARCHIVE")" || fail "expected RESULTS and ARCHIVE in folders that can be written, got $RESULTS, $ARCHIVE"
((!DRY)) || echo "A rehearsal without a GPU on tiny shapes: nothing in this folder is a result." >"$rehearsal"
[ -z "${COMMIT:-}" ] || echo "$COMMIT" >"$RESULTS/commit.txt"
PEERS=$(mktemp -d)
export DRY PYTHON RESULTS WHEELS PEERS PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PEERS${PYTHONPATH:+:$PYTHONPATH}"
export -f prepare sanitize
ended=() child="" stopped="" STARTED=$(date +%s)
for signal in INT TERM HUP; do
  # shellcheck disable=SC2064 # the name as it is now
  trap "stopped=$signal; exit 1" "$signal"
done
trap finish EXIT
arguments
steps
