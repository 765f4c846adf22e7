#!/usr/bin/env bash
# Lays out what gpu_check.sh needs on a GPU machine that has no time to build, or nothing to build with:
#   benchmarks/gpu_package.sh [--build DIR] [--to DIR]
#   --build DIR  takes what this build tree has; otherwise the preset hopper (sm_90a alone) is built
#   --to DIR     .gpu, if it is not given
# The folder is a checkout without sources: every file lies where it lies there, links are files, and no
# path leads out of it. Unpack it anywhere and run its benchmarks/gpu_check.sh --output DIR.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly root most_mib=60
build="" to=$root/.gpu
while (($# > 1)); do
  case $1 in
    --build) build=$(realpath "$2") ;;
    --to) to=$(realpath -m "$2") ;;
    *) break ;;
  esac
  shift 2
done
if (($# > 0)); then
  echo "unknown argument '$1'; allowed: --build DIR, --to DIR" >&2
  exit 2
fi
cd "$root"
if [[ -z $build ]]; then
  build=$root/build/hopper
  cmake --preset hopper "-DPython_EXECUTABLE=$(command -v "${PYTHON:-python3}")"
  cmake --build --preset hopper --parallel "${JOBS:-$(nproc)}"
fi

rm -rf "$to"
# take BASE FILE...: copies, with their place below BASE, to the same place below $into.
take() {
  local base=$1 file
  shift
  for file in "$@"; do
    mkdir -p "$into/$(dirname "$file")"
    cp --recursive --dereference "$base/$file" "$into/$file"
  done
}
into=$to/build
core=$(readelf --dynamic "$build/cpp_tests/kernels/gpu" | sed -n 's/.*NEEDED.*\[\(libflashtile[^]]*\)\]/\1/p')
take "$build" "kernel/$core" matrix.json cpp_tests/kernels/gpu cpp_tests/traps/traps_gpu \
  cpp_tests/ptx_machine/gpu_conformance
# Not through the build tree's links to it, which a file that is new has only after cmake.
take "$root" python/flashtile
take "$build" python/flashtile/lib
into=$to
take "$root" pyproject.toml cpp_tests/ptx_machine/tests/conformance.txt \
  benchmarks/{bench,bench_cases,bench_report,bench_runs,bench_scores,bench_table,bench_timing}.py \
  benchmarks/gpu_{facts,report,threads}.py benchmarks/gpu_{check,each}.sh \
  python/tests/{conftest,reference}.py \
  python/tests/test_{attention,varlen,kvcache,torch_integration,matrix}.py
{
  git describe --always --abbrev=12 --dirty=+ 2>/dev/null || echo unknown
  sed -n 's/^CMAKE_CUDA_ARCHITECTURES:.*=/architectures: /p' "$build/CMakeCache.txt"
} >"$to/package.txt"
find "$to" -name __pycache__ -type d -prune -exec rm -rf {} +

fail() {
  echo "$to is no package: $1" >&2
  exit 1
}
links=$(find "$to" -type l)
[[ -z $links ]] || fail "links: $links"
for binary in "$to"/build/cpp_tests/*/* "$to/build/kernel/$core" "$to"/build/python/flashtile/lib/*; do
  for path in $(readelf --dynamic "$binary" | sed -n 's/.*R.*PATH.*\[\(.*\)\]/\1/p' | tr ':' ' '); do
    [[ $path == \$ORIGIN* ]] || fail "$binary looks for libraries in $path"
  done
done
kib=$(du --summarize --apparent-size --block-size=1K "$to" | cut -f 1)
((kib <= most_mib * 1024)) || fail "$((kib / 1024)) MiB; allowed: $most_mib"
echo "$to: $((kib / 1024)) MiB of $most_mib, $(find "$to" -type f | wc -l) files, $(tail -n 1 "$to/package.txt")"
