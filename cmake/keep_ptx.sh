#!/bin/sh
# keep_ptx.sh FILE NVCC ARGUMENT...: runs nvcc, and keeps as FILE the PTX that it makes on the way to
# machine code. So the tests execute what devices run, and nothing is compiled twice.
set -eu
file=$1
shift
scratch=$file.scratch
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch"
"$@" --keep --keep-dir "$scratch"
mv "$scratch"/*.ptx "$file"
