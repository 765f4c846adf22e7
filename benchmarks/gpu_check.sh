#!/usr/bin/env bash
# Everything that only a GPU can answer, in one command, without a network and in under 9 minutes:
#   benchmarks/gpu_check.sh [--build DIR] [--wheel FILE] [--output FILE] [--dry-run]
#   --build DIR    a build tree made on this machine; otherwise build/lineinfo is built here
#   --wheel FILE   pytest, demo and benchmark use this wheel instead of the build tree
#   --output FILE  the report; otherwise benchmarks/results/<gpu>/gpu_check.json
#   --dry-run      prints every step's command instead of running it; the report has no values
# Needs python3 with torch and pytest, nvcc, cmake and ninja; a dry run needs neither them nor a GPU,
# only flashtile in the build tree or in Python. Every step has a share of the time, and what earlier
# ones left of theirs; a step that fails is recorded and the next one runs. Exit status 0: every step
# passed, or was shown.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

build=""
wheel=""
output=""
dry=0
while (($# > 0)); do
  case $1 in
    --dry-run) dry=1 && shift && continue ;;
    --build | --wheel | --output) (($# > 1)) || break ;;
    *) break ;;
  esac
  case $1 in
    --build) build=$(realpath "$2") ;;
    --wheel) wheel=$(realpath "$2") ;;
    --output) output=$(realpath -m "$2") ;;
  esac
  shift 2
done
if (($# > 0)); then
  echo "unknown argument '$1'; allowed: --build DIR, --wheel FILE, --output FILE, --dry-run" >&2
  exit 2
fi
cd "$root" || exit 2
export FLASHTILE_REQUIRE_GPU=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# note NAME STATUS SECONDS SHARE COMMAND: one line for the report. STATUS is passed, skipped,
# failed (N), timeout, missing or dry run.
note() {
  printf '%s\t%s\t%s\t%s\t%s\n' "$@" >>"$work/steps.tsv"
  printf '%-14s %-14s %4s of %3s s' "$1" "$2" "${3:--}" "$4"
  if ((dry)); then printf '  %s' "$5"; fi
  printf '\n'
}

due=0 # seconds after the start by which the steps so far have to end

# step NAME SHARE COMMAND...: runs it until its share of the time is over.
step() {
  local name=$1 share=$2 start=$SECONDS code=0 command status=passed
  due=$((due + share))
  shift 2
  printf -v command '%q ' "$@"
  if ((dry)); then
    show "$name" "$share" "$command" "$@"
    return
  fi
  if ((due - SECONDS < 5)); then
    note "$name" "no time left" 0 "$share" "$command"
    return 1
  fi
  timeout --kill-after=5 "$((due - SECONDS))" "$@" >"$work/$name.log" 2>&1 || code=$?
  case $code in
    0) ;;
    77) status=skipped ;; # a check that does not apply to this GPU
    124 | 137) status=timeout ;;
    *) status="failed ($code)" ;;
  esac
  note "$name" "$status" $((SECONDS - start)) "$share" "$command"
  [[ $status == passed || $status == skipped ]] && return
  tail -n 15 "$work/$name.log" | sed 's/^/    /'
  return "$code"
}

# show NAME SHARE COMMAND_TEXT COMMAND...: a step of a dry run. The benchmarks have one of their own,
# which names what would be timed.
show() {
  local name=$1 share=$2 text=$3 code=0 status="dry run"
  shift 3
  if [[ $name == bench_* ]]; then
    "$@" --dry-run >"$work/$name.log" 2>&1 || { code=$? && status="failed ($code)"; }
  fi
  note "$name" "$status" "" "$share" "$text"
  return "$code"
}

build_here() {
  local jobs
  jobs=$(nproc)
  step configure 20 cmake --preset lineinfo "-DPython_EXECUTABLE=$(command -v "$python")" || return
  step build 140 cmake --build "$build" --parallel "$jobs" \
    --target flashtile_torch gpu gpu_conformance list_cases || return
  # The C++ torch test, which is tied to the torch of this machine; ctest's gpu label includes it.
  step build_torch 50 cmake --build "$build" --parallel "$jobs" --target attention_test
}

# Small shapes in the executable that needs no torch: the tool sees our kernels and nothing else.
sanitize() {
  local tool=$1 share=$2
  shift 2
  if [[ -z $sanitizer ]]; then
    due=$((due + share))
    note "$tool" missing "" "$share" compute-sanitizer
    return
  fi
  step "$tool" "$share" "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 \
    "$build/cpp_tests/kernels/gpu" "$@"
}

# bench DIRECTION SHARE: every case of one pass against SDPA and, if it is there, FlashAttention-3.
# Ends by itself in time, so that what was measured is kept.
bench() {
  step "bench_$1" "$2" "$python" benchmarks/bench.py --device cuda --pass "$1" \
    --time-limit "$((due + $2 - SECONDS - 8))" --output "$work/bench_$1"
}

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if ((dry)) && [[ -z $sanitizer ]]; then sanitizer=compute-sanitizer; fi
if [[ -z $build ]]; then
  build=$root/build/lineinfo
  build_here
fi
due=210 # what building may take, or did not
packages=$build/python
if [[ -n $wheel ]]; then
  step wheel 5 "$python" -m zipfile -e "$wheel" "$work/wheel"
  if ((!dry)); then packages=$work/wheel; fi
fi
export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}

step conformance 20 "$build/cpp_tests/ptx_machine/gpu_conformance"
step ctest 50 ctest --test-dir "$build" -L '^gpu$' -E '^gpu_conformance/' --no-tests=error \
  --output-on-failure --timeout 45 --parallel 4
step pytest 60 "$python" -m pytest -q -p no:cacheprovider -k cuda python/tests
sanitize memcheck 25 "shapes bf16 d64" "options fp16 d128" "varlen bf16 d128"
sanitize racecheck 20 "shapes fp16 d64" "varlen bf16 d128"
sanitize synccheck 12 "shapes bf16 d128" "varlen fp16 d64"
sanitize initcheck 13 "options bf16 d64" "varlen fp16 d128"
bench forward 50
bench backward 50
step demo 10 "$python" examples/demo.py --device cuda

options=()
if ((dry)); then options+=(--dry-run); fi
if [[ -n $output ]]; then options+=(--output "$output"); fi
"$python" benchmarks/gpu_report.py "$work" "${options[@]}"
