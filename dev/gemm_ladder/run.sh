#!/bin/sh
# Register tiles alone, then int8_linear of the commits given (default: this tree), one thread:
#   dev/gemm_ladder/run.sh [COMMIT...]
# or for AVX2 the ways of multiplying, and products of the tier avx2 as percent of the same peak (vpdpbusd):
#   TIER=avx2 dev/gemm_ladder/run.sh [COMMIT...]
set -eu
here=$(dirname "$0")
root=$(git -C "$here" rev-parse --show-toplevel)
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
tier=${TIER:-avx512vnni}
avx2="-std=c++17 -O3 -mavx2 -mfma -mf16c -mprfchw"
avx512="$avx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mprefer-vector-width=512"
if [ "$tier" = avx2 ]; then flags=$avx2 alone=avx2.cc; else flags=$avx512 alone=loops.cc; fi
${CXX:-g++} $flags "$here/$alone" -o "$built/alone"
"$built/alone"
${CXX:-g++} $flags "-DTIER=\"$tier\"" "$here/products.cc" -o "$built/products" -ldl
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
  ${CXX:-g++} $flags -shared -fPIC -fopenmp -ffp-contract=off -fno-math-errno -DQK_TIER=$tier -DQK_TIER_$tier \
    -w "$cpu/int8_linear.cc" "$cpu/dispatch.cc" -o "$built/$version"
  libraries="$libraries $built/$version"
done
"$built/products" "${REPEATS:-9}" "${SHAPES:-800x2304x768,800x768x768,800x3072x768,800x768x3072,2048x2048x2048,50x3072x768}" $libraries
