#!/bin/sh
# Register tiles alone, then int8_linear of the commits given (default: this tree), one thread:
#   dev/gemm_ladder/run.sh [COMMIT...]
set -eu
here=$(dirname "$0")
root=$(git -C "$here" rev-parse --show-toplevel)
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
flags="-std=c++17 -O3 -mavx2 -mfma -mf16c -mprfchw -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni
  -mprefer-vector-width=512"
${CXX:-g++} $flags "$here/loops.cc" -o "$built/loops"
"$built/loops"
${CXX:-g++} $flags "$here/products.cc" -o "$built/products" -ldl
libraries=""
for version in "${@:-tree}"; do
  mkdir "$built/src-$version"
  if [ "$version" = tree ]; then
    mkdir -p "$built/src-tree/csrc" && cp -r "$root/csrc/cpu" "$built/src-tree/csrc/"
  else
    git -C "$root" archive "$version" csrc/cpu | tar -x -C "$built/src-$version"
  fi
  cpu="$built/src-$version/csrc/cpu"
  # -fopenmp as in setup.py; symbols are visible here, because the libraries are opened one by one.
  ${CXX:-g++} $flags -shared -fPIC -fopenmp -ffp-contract=off -fno-math-errno -DQK_TIER=avx512vnni -DQK_TIER_avx512vnni \
    -w "$cpu/int8_linear.cc" "$cpu/dispatch.cc" -o "$built/$version"
  libraries="$libraries $built/$version"
done
"$built/products" "${REPEATS:-9}" "${SHAPES:-800x2304x768,800x768x768,800x3072x768,800x768x3072,2048x2048x2048,50x3072x768}" $libraries
