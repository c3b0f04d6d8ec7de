#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the gpu tests, all benchmarks, a kernel profile, the plots.
#
#   bash benchmarks/gpu.sh [OUT] [SECONDS]
#
# Installs nothing: PyTorch, Triton, pytest and the requirements of segmenter-fast must be installed, segmenter-fast need
# not be. Results go to OUT/<device>/ (default: $OUT, else benchmarks/results) as soon as they exist, the most valuable
# first. SECONDS (default 480) is the time for all of it; the tests get at most a quarter.
# DEVICE=cpu rehearses the same steps without a GPU on very small cases and without torch.compile, to test the script
# itself; its figures mean nothing, and OUT must be given.
# Exit code: 0; 1 if a step failed (the others still ran); 2 without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
device=${DEVICE:-cuda}
if [ "$device" != cuda ] && [ "$device" != cpu ]; then
    echo "gpu.sh: DEVICE must be cuda or cpu, got $device" >&2
    exit 2
fi
if [ "$device" = cpu ] && [ -z "${1:-${OUT:-}}" ]; then
    echo "gpu.sh: DEVICE=cpu is a rehearsal; name a folder for its results: DEVICE=cpu bash benchmarks/gpu.sh OUT" >&2
    exit 2
fi
out=${1:-${OUT:-benchmarks/results}}
budget=${2:-480}
start=$SECONDS
failed=()

python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
"$python" -c "import sys, torch; sys.exit(3 if '$device' == 'cuda' and not torch.cuda.is_available() else 0)" 2>/dev/null
case $? in
    0) ;;
    3)
        echo "gpu.sh: no GPU: PyTorch sees no CUDA or ROCm device here, so nothing was run" >&2
        exit 2
        ;;
    *)
        echo "gpu.sh: $python has no PyTorch; set PYTHON to one that has" >&2
        exit 2
        ;;
esac
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"  # a checkout can be imported as it is

left() { echo $((budget - (SECONDS - start))); }

# step NAME LIMIT COMMAND...: runs the command for at most LIMIT seconds and remembers a failure.
step() {
    local name=$1 limit=$2
    shift 2
    if [ "$limit" -lt 5 ]; then
        echo "== $name: no time left"
        failed+=("$name")
        return
    fi
    echo "== $name ($limit s)"
    timeout --signal=INT --kill-after=20 "$limit" "$@"
    local code=$?
    if [ $code -ne 0 ]; then
        echo "== $name: exit code $code"
        failed+=("$name")
    fi
}

# bench NAME PART OPTIONS...: runs `segmenter-fast bench OPTIONS` for the PARTth part of the time that is left, less half a
# minute for the plots. It stops by itself after the case in which the time is up, and is stopped half a minute later.
bench() {
    local name=$1 time=$((($(left) - 30) / $2))
    shift 2
    local limit=$((time < 5 ? time : time + 30))
    step "$name" "$limit" "$python" -m segmenter_fast.cli bench "$@" --device "$device" --out "$out" --budget "$time"
}

record=$("$python" -m segmenter_fast.benchmarks.device "$device") || exit 2
echo "$record"
results=$out/$(awk '$1 == "slug" { print $2 }' <<<"$record")
mkdir -p "$results"
if [ "$device" = cuda ]; then
    tests=(-m gpu)
    models=() steps=() whole=()
    ops=(attention upsample_cross_entropy upsample_argmax upsample_softmax mask_scores)
else
    tests=(tests/benchmarks/test_compare.py)
    models=(--variant seg_t_linear_16 --size 64 --classes 7 --dtype float32 --no-compile --no-extras --seconds 0.1)
    steps=(--quick --size 64 --classes 7 --dtype float32 --no-compile)
    whole=(--model t --size 64 --classes 7 --dtype float32 --no-compile)
    ops=(mask_scores --quick)
    export TORCHDYNAMO_DISABLE=1
fi
# Whole models and training steps first, then the ops, beginning with attention and the loss.
step tests $((budget / 4)) "$python" -m pytest "${tests[@]}" -q --junitxml "$results/tests.xml"
bench throughput 3 "${models[@]}"
bench training 3 train "${steps[@]}"
step profile $((($(left) - 30) / 3)) "$python" -m segmenter_fast.benchmarks.profiler --device "$device" --out "$out" "${whole[@]}"
bench kernels 1 kernels "${ops[@]}"
step plots 60 "$python" -m segmenter_fast.benchmarks.plots "$results"

echo "== results in $results after $((SECONDS - start)) s"
ls -l "$results"
if [ ${#failed[@]} -gt 0 ]; then
    echo "== failed: ${failed[*]}"
    exit 1
fi
