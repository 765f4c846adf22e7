#!/usr/bin/env bash
# Everything that only a GPU can answer, in one command, without a network and in under 9 minutes:
#   benchmarks/gpu_check.sh [--build DIR] [--wheel FILE] [--output FILE]
#   --build DIR    a build tree made on this machine; otherwise build/lineinfo is built here
#   --wheel FILE   pytest, demo and benchmark use this wheel instead of the build tree
#   --output FILE  the report; otherwise benchmarks/results/<gpu>/gpu_check.json
# Needs python3 with torch and pytest, nvcc, cmake and ninja. Every step has a time limit; a step
# that fails is recorded and the next one runs. Exit status 0: every step passed.
set -uo pipefail

readonly total_seconds=530
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

build=""
wheel=""
output=""
while (($# > 1)); do
  case $1 in
    --build) build=$(realpath "$2") ;;
    --wheel) wheel=$(realpath "$2") ;;
    --output) output=$(realpath -m "$2") ;;
    *) break ;;
  esac
  shift 2
done
if (($# > 0)); then
  echo "unknown argument '$1'; allowed: --build DIR, --wheel FILE, --output FILE" >&2
  exit 2
fi
cd "$root" || exit 2
export FLASHTILE_REQUIRE_GPU=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# note NAME STATUS SECONDS: one line for the report; STATUS is passed, failed (N), timeout or missing.
note() {
  printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$work/steps.tsv"
  printf '%-12s %-14s %s s\n' "$1" "$2" "$3"
}

# step NAME LIMIT COMMAND...: runs it for LIMIT seconds at most, and never beyond the total.
step() {
  local name=$1 limit=$2 start=$SECONDS rest=$((total_seconds - SECONDS)) code=0
  shift 2
  if ((rest < 5)); then
    note "$name" "no time left" 0
    return 1
  fi
  timeout --kill-after=5 "$((limit < rest ? limit : rest))" "$@" >"$work/$name.log" 2>&1 || code=$?
  case $code in
    0) note "$name" passed $((SECONDS - start)) ;;
    124 | 137) note "$name" timeout $((SECONDS - start)) ;;
    *) note "$name" "failed ($code)" $((SECONDS - start)) ;;
  esac
  ((code == 0)) || tail -n 15 "$work/$name.log" | sed 's/^/    /'
  return "$code"
}

build_here() {
  build=$root/build/lineinfo
  step configure 60 cmake --preset lineinfo "-DPython_EXECUTABLE=$(command -v "$python")" || return
  step build 240 cmake --build "$build" --parallel "$(nproc)" --target flashtile_torch gpu gpu_conformance || return
  # The C++ torch test, which is tied to the torch of this machine; ctest's gpu label includes it.
  step build_torch 150 cmake --build "$build" --parallel "$(nproc)" --target attention_test
}

# Small shapes in the executable that needs no torch: the tool sees our kernels and nothing else.
sanitize() {
  local tool=$1 limit=$2
  shift 2
  if [[ -z $sanitizer ]]; then
    note "$tool" missing 0
    return
  fi
  step "$tool" "$limit" "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 \
    "$build/cpp_tests/kernels/gpu" "$@"
}

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
[[ -n $build ]] || build_here
export PYTHONPATH=$build/python
if [[ -n $wheel ]]; then
  step wheel 60 "$python" -m zipfile -e "$wheel" "$work/wheel"
  export PYTHONPATH=$work/wheel
fi

step ctest 120 ctest --test-dir "$build" -L '^gpu$' --no-tests=error --output-on-failure \
  --timeout 100 --parallel 4
step bench 120 "$python" benchmarks/bench.py --device cuda --output "$work/bench"
sanitize memcheck 60 "shapes bf16 d64" "options fp16 d128" "varlen bf16 d128"
sanitize racecheck 60 "shapes fp16 d64" "varlen bf16 d128"
sanitize synccheck 40 "shapes bf16 d128" "varlen fp16 d64"
sanitize initcheck 40 "options bf16 d64" "varlen fp16 d128"
step pytest 150 "$python" -m pytest -q -p no:cacheprovider python/tests
step demo 60 "$python" examples/demo.py --device cuda

"$python" benchmarks/gpu_report.py "$work" ${output:+--output "$output"}
