#!/usr/bin/env bash
# Build, GPU tests, benchmarks and compute-sanitizer on a GPU machine, in one go within 9 minutes.
#
#     bash benchmarks/device.sh          from the repository root; everything goes to $OUT (default: ./out)
#
# SECONDS_LEFT=300 sets another limit; BUILT=1 takes the libraries that lie in bregman_cuda/ already.
# Needs python3 with torch, nvcc of torch's CUDA major, pytest, hypothesis and numpy; no network. A stage that fails
# or outlasts its limit does not stop the next ones; the exit status is 1 then. The summary comes last.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT="$(realpath -m "${OUT:-out}")" PYTHONUNBUFFERED=1
PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT"
exec > >(tee "$OUT/device.log") 2>&1

DEADLINE=$((SECONDS + ${SECONDS_LEFT:-535}))
SUMMARY=()
FAILED=0

# stage NAME LIMIT COMMAND...: run it, at most LIMIT seconds and never past the deadline; note how it went.
stage() {
  local name=$1 limit=$2 begin=$SECONDS status=0
  shift 2
  ((limit > DEADLINE - SECONDS)) && limit=$((DEADLINE - SECONDS))
  echo; echo "=== $name"
  if ((limit < 5)); then
    status=skipped
    FAILED=1
  else
    timeout -k 5 "$limit" "$@" || { status=$?; FAILED=1; }
  fi
  SUMMARY+=("$(printf '%-12s %4d s  %s' "$name" $((SECONDS - begin)) "$(outcome "$status")")")
}
outcome() {
  case $1 in
    0) echo ok ;;
    124 | 137) echo "OUT OF TIME" ;;
    skipped) echo "SKIPPED: no time left" ;;
    *) echo "FAILED (status $1)" ;;
  esac
}
skip() { SUMMARY+=("$(printf '%-12s %4d s  skipped: %s' "$1" 0 "$2")"); echo; echo "=== $1: skipped: $2"; }

GPU=$("$PYTHON" -c 'import torch; print(int(torch.cuda.is_available()))' 2>/dev/null || echo 0)
ARCH=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null || echo 9.0)

if [[ ${BUILT:-0} != 1 ]]; then
  # Only this device's architecture: all of them take minutes.
  stage build 240 env TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$ARCH}" BREGMAN_CUDA_REQUIRE="${BREGMAN_CUDA_REQUIRE-cuda}" \
    "$PYTHON" setup.py -q build_ext --inplace
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
stage info 60 "$PYTHON" -m bregman_cuda info

if [[ $GPU == 1 ]]; then
  PARALLEL=$("$PYTHON" -c 'import os, xdist; print("-n", min(12, os.cpu_count()))' 2>/dev/null)
  # shellcheck disable=SC2086
  stage tests 150 "$PYTHON" -m pytest tests/test_gpu.py tests/test_rigl.py tests/test_whole_tensors.py -m gpu -q \
    --maxfail=20 -p no:cacheprovider $PARALLEL
  stage benchmarks 150 "$PYTHON" benchmarks/report.py --device cuda --quick --out "$OUT" --seconds 1 \
    --shapes large gpt2 resnet50 resnet18 tiny thousand
  if command -v compute-sanitizer >/dev/null; then
    check() { stage "$1" 90 compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 "$PYTHON" benchmarks/sanitize.py "${@:2}"; }
    check memcheck 0 1
    check racecheck 0 7  # 7 times as many seconds a case; several processes at once take longer than one
  else
    skip sanitizer "no compute-sanitizer on the path"
  fi
else
  skip tests "torch sees no CUDA device"
  skip sanitizer "torch sees no CUDA device"
  stage benchmarks 200 "$PYTHON" benchmarks/report.py --quick --device cpu --out "$OUT"
fi

echo; echo "=== summary"
printf '%s\n' "${SUMMARY[@]}"
exit $FAILED
