#!/usr/bin/env bash
# Everything that only a GPU can answer, offline, as a plan for a GPU that is lent for ten minutes:
#   benchmarks/gpu_check.sh [--output DIR] [--build DIR] [--wheel FILE] [--sanitizers] [--dry-run]
#   --output DIR   gets steps.tsv, log.txt and bench.jsonl as they happen, facts.json, and last the
#                  report, gpu_check.json; otherwise build/gpu_check
#   --build DIR    a build tree; otherwise the package's, or build/lineinfo, which is built first
#   --wheel FILE   Python's steps use this wheel instead of the build tree
#   --sanitizers   racecheck, synccheck and initcheck, too. They report kernels of this form that are
#                  right, those of NVIDIA as well.
#   --dry-run      runs nothing: shows every step's command, and looks for the files that it names
# In a package of gpu_package.sh nothing is built, and the plan is all. In a checkout the rest of the
# tests and the demo follow. Each step has its own limit; one that fails is recorded and the next one
# runs. The first line says what was found; without torch for Python the steps that want it say so.
# Exit status 0: every step passed, or was shown.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly root python=${PYTHON:-python3} begun=$SECONDS
build="" wheel="" output=$root/build/gpu_check dry=0 sanitizers=0
usage() {
  echo "unknown argument '$1'; allowed: --output DIR, --build DIR, --wheel FILE, --sanitizers, --dry-run" >&2
  exit 2
}
while (($# > 0)); do
  case $1 in
    --dry-run) dry=1 && shift && continue ;;
    --sanitizers) sanitizers=1 && shift && continue ;;
    --output | --build | --wheel) (($# > 1)) || usage "$1" ;;
    *) usage "$1" ;;
  esac
  case $1 in
    --output) output=$(realpath -m "$2") ;;
    --build) build=$(realpath "$2") ;;
    --wheel) wheel=$(realpath "$2") ;;
  esac
  shift 2
done
cd "$root" && mkdir -p "$output" || exit 2
readonly log=$output/log.txt benchmarks=$root/benchmarks
rm -f "$output"/{steps.tsv,log.txt,bench.jsonl,facts.json,gpu_check.json}
is_package=0 builds=0
[[ -f $root/package.txt ]] && is_package=1
if [[ -z $build ]]; then
  if ((is_package)); then build=$root/build; else build=$root/build/lineinfo builds=1; fi
fi
packages=$build/python
if [[ -n $wheel ]]; then packages=$output/wheel; fi
readonly gpu=$build/cpp_tests/kernels/gpu traps=$build/cpp_tests/traps/traps_gpu
export FLASHTILE_REQUIRE_GPU=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export FLASHTILE_MATRIX=$build/matrix.json
export FLASHTILE_CONFORMANCE=$root/cpp_tests/ptx_machine/tests/conformance.txt
export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}
export LD_LIBRARY_PATH=$build/kernel${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
if ((is_package)); then
  FLASHTILE_COMMIT=$(head -n 1 "$root/package.txt")
  export FLASHTILE_COMMIT
fi

planned=0

# note NAME STATUS SECONDS LIMIT COMMAND [RESULT]: a step's line, here and in steps.tsv. STATUS is
# passed, skipped, failed (N), timeout, no torch, missing FILE or dry run.
note() {
  printf '%s\t%s\t%s\t%s\t%s\n' "${@:1:5}" >>"$output/steps.tsv"
  printf '%-12s %-12s %3s of %3s s  %s\n' "$1" "$2" "${3:--}" "$4" "${6:-}"
}

# Of the words of a command the first file of ours that is not there or cannot be run; files that the
# plan builds do not count.
missing_file() {
  local word
  for word in "$@"; do
    [[ $word == "$root"/* || $word == "$build"/* ]] || continue
    [[ $word == "$output"/* ]] && continue
    ((builds && dry)) && [[ $word == "$build" || $word == "$build"/* ]] && continue
    [[ -d $word || -r $word && $word == *.* || -x $word ]] && continue
    echo "$word"
    return
  done
}

# step NAME LIMIT COMMAND...: runs it, for LIMIT seconds at most.
step() {
  local name=$1 limit=$2 start=$SECONDS code=0 status=passed command missing from
  shift 2
  planned=$((planned + limit))
  printf -v command '%q ' "$@"
  missing=$(missing_file "$@")
  if [[ -n $missing ]]; then
    note "$name" "missing $missing" "" "$limit" "$command"
    return 1
  fi
  if ((dry)); then
    show "$name" "$limit" "$command" "$@"
    return
  fi
  printf '=== %s\n' "$name" >>"$log"
  from=$(stat --format %s "$log")
  timeout --kill-after=3 "$((limit - 3))" "$@" >>"$log" 2>&1 || code=$?
  case $code in
    0) ;;
    77) status=skipped ;; # a check that does not apply to this GPU
    124 | 137) status=timeout ;;
    *) status="failed ($code)" ;;
  esac
  note "$name" "$status" $((SECONDS - start)) "$limit" "$command" \
    "$(tail -c "+$((from + 1))" "$log" | tail -n 1 | cut -c 1-120)"
  [[ $status == passed || $status == skipped ]] && return
  tail -c "+$((from + 1))" "$log" | tail -n 12 | sed 's/^/    /'
  return "$code"
}

# show NAME LIMIT COMMAND_TEXT COMMAND...: a step of a dry run. The benchmarks have one of their own,
# which names what would be timed.
show() {
  local name=$1 limit=$2 text=$3 code=0 status="dry run"
  shift 3
  if [[ $name == bench_* ]] && ((has_torch)); then
    "$@" --dry-run >>"$log" 2>&1 || { code=$? && status="failed ($code)"; }
  fi
  note "$name" "$status" "" "$limit" "$text" "$text"
  return "$code"
}

# torch_step: a step that wants torch.
torch_step() {
  if ((has_torch || dry)); then
    step "$@"
  else
    planned=$((planned + $2))
    note "$1" "no torch" "" "$2" "${*:3}"
  fi
}

# each NAME LIMIT LIMIT_EACH EXECUTABLE TEST...: tests side by side, each with a limit of its own and a
# line in the log; --except TEST...: all others.
each() { step "$1" "$2" "$benchmarks/gpu_each.sh" "$3" 12 "${@:4}"; }

# bench NAME LIMIT ARGUMENT...: cases against SDPA's flash and cuDNN backends and, if it is there,
# FlashAttention-3. Ends by itself in time.
bench() {
  torch_step "bench_$1" "$2" "$python" "$benchmarks/bench.py" --device cuda --seconds 0.2 \
    --time-limit $(($2 - 18)) --lines "$output/bench.jsonl" "${@:3}"
}

# sanitize TOOL LIMIT TEST...: small shapes in the executable that needs no torch, so that the tool sees
# our kernels and nothing else.
sanitize() {
  if [[ -z $sanitizer ]]; then
    planned=$((planned + $2))
    note "$1" "missing compute-sanitizer" "" "$2" "$1"
    return 1
  fi
  step "$1" "$2" "$sanitizer" --tool "$1" --error-exitcode 9 --print-limit 20 "$gpu" "${@:3}"
}
memcheck() { sanitize memcheck 36 "shapes bf16 d128" "varlen bf16 d128"; }

# What the plan itself tests of the executable gpu; its step "rest" has all others.
readonly first="shapes bf16 d128"
readonly others=(
  "shapes bf16 d64" "shapes bf16 d96" "shapes fp16 d192" "shapes bf16 d256" "shapes fp16 d32"
  "options bf16 d64" "options bf16 d128" "options bf16 d192" "options fp16 d256"
  "varlen bf16 d64" "varlen bf16 d128" "windows bf16 d128" "windows bf16 d256" "in use bf16 d128"
  "few queries fp16 d64" "few queries bf16 d72/96"
  "pages of every size: decode and prefill in one call"
  "head dims of every class, on pages of 16 and 7"
  "heads in groups of 1 to 16, and one key head for all"
  "long sequences are cut into parts, as many as asked for"
  "prefill over aligned rows: every page size, head dim and way to load"
  "packed rows at the edge of a form, in one call"
)
readonly threads=(
  "context: the first call of a thread is a forward"
  "context: the first call of a thread is a backward"
  "context: the first call of a thread is a prompt over pages that TMA loads"
  "context: the first call of a thread is a prompt over pages that warps copy"
)
readonly deterministic=(
  "D1 deterministic: 12 runs, bit-equal dq, dk, dv: causal, window, packed, GQA, head dim 256"
  "D2 3 batches, 256 queries, 128 keys, head dim 128, fp16 x 3: five runs agree with fp64"
  "D3 dout is written right before the backward"
  "D5 a longer neighbour changes no bit of the first sequence"
  "G2 the first calls are captured: an append and a check, replayed with other lengths"
  "G3 a captured append and attention, replayed with longer sequences and other pages"
)
readonly tests=("$root"/python/tests/test_{attention,varlen,kvcache,torch_integration,matrix}.py)

build_here() {
  local jobs
  jobs=$(nproc)
  step configure 40 cmake --preset lineinfo "-DPython_EXECUTABLE=$(command -v "$python")" || return
  step build 400 cmake --build "$build" --parallel "$jobs" \
    --target flashtile_torch gpu gpu_conformance traps_gpu list_cases attention_test
}

# In the order of what a first minute on new hardware has to say.
plan() {
  step conformance 30 "$build/cpp_tests/ptx_machine/gpu_conformance"
  step first 25 "$gpu" "$first" || { memcheck && checked=1; }
  each others 55 25 "$gpu" "${others[@]}"
  each threads 15 10 "$gpu" "${threads[@]}"
  torch_step autograd 25 "$python" "$benchmarks/gpu_threads.py"
  bench 16k 90 --kind dense --tokens 16384
  bench decode 44 --kind decode prefill
  bench lengths 50 --kind dense --tokens 8192 4096 2048 1024 512 32768
  each traps 25 20 "$traps" "${deterministic[@]}"
  torch_step pytest 60 "$python" -m pytest -q -p no:cacheprovider -k cuda --maxfail 10 "${tests[@]}"
  each rest 45 20 "$gpu" --except "$first" "${others[@]}" "${threads[@]}"
  ((checked)) || memcheck
}

# What only a checkout has, and has the time for.
rest_of_checkout() {
  step ctest 300 ctest --test-dir "$build" -L '^gpu$' -E '^(gpu_conformance|gpu)/' --no-tests=error \
    --output-on-failure --parallel 4
  torch_step pytest_all 200 "$python" -m pytest -q -p no:cacheprovider -k cuda "$root/python/tests"
  torch_step demo 30 "$python" "$root/examples/demo.py" --device cuda
}

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if ((dry)) && [[ -z $sanitizer ]]; then sanitizer=compute-sanitizer; fi
checked=0 has_torch=0
find_facts() { timeout 30 "$python" "$benchmarks/gpu_facts.py" "$output/facts.json"; }
find_facts && has_torch=1
[[ -f $output/facts.json ]] || echo "found: no $python that runs gpu_facts.py in 30 s"
if ((builds)); then build_here; fi
if [[ -n $wheel ]]; then step wheel 10 "$python" -m zipfile -e "$wheel" "$packages"; fi
if ((!dry && (builds || ${#wheel} > 0))); then find_facts >/dev/null; fi # of flashtile, too

planned=30 # what was found
plan
readonly loan=$planned
if ((sanitizers)); then
  sanitize racecheck 30 "shapes fp16 d64" "varlen bf16 d128"
  sanitize synccheck 30 "shapes bf16 d128" "varlen fp16 d64"
  sanitize initcheck 30 "options bf16 d64" "varlen fp16 d128"
fi
if ((!is_package)); then rest_of_checkout; fi
echo "planned: $loan s for a loan; took $((SECONDS - begun)) s in all"

options=()
if ((dry)); then options+=(--dry-run); fi
"$python" "$benchmarks/gpu_report.py" "$output" "${options[@]}"
