#!/usr/bin/env bash
# Runs tests of an executable (cpp_tests/support/check.h) side by side, each in a process and for
# LIMIT seconds at most, and prints a line for each as it ends:
#   benchmarks/gpu_each.sh LIMIT JOBS EXECUTABLE [--except] TEST...
# --except: every test of the executable but these. Exit status 0: all passed or skipped themselves.
set -uo pipefail

export limit=$1 executable=$3
jobs=$2
shift 3
if [[ ${1:-} == --except ]]; then
  shift
  mapfile -t names < <("$executable" --list | grep -Fxv -f <(printf '%s\n' "$@"))
else
  names=("$@")
fi

run() {
  local start=$SECONDS code=0 status=passed lines
  lines=$(timeout --foreground --kill-after=2 "$limit" "$executable" "$1" 2>&1) || code=$?
  case $code in
    0) ;;
    77) status=skipped ;;
    124 | 137) status=timeout ;;
    *) status="failed ($code)" ;;
  esac
  if [[ $status != passed && $status != skipped ]]; then
    printf '%s\n' "$lines" | tail -n 12 | sed 's/^/    /'
  fi
  printf '%-12s %3s s  %s\n' "$status" $((SECONDS - start)) "$1"
  [[ $status == passed || $status == skipped ]]
}
export -f run

code=0
printf '%s\0' "${names[@]}" | xargs -0 -P "$jobs" -I{} bash -c 'run "$1"' _ {} || code=1
echo "${#names[@]} tests ran, $( ((code)) && echo 'NOT all passed' || echo 'all passed')"
exit "$code"
