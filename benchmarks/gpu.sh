#!/usr/bin/env bash
# Everything that needs a GPU, in one command, the most valuable first; FIRST_GPU_RUN.md says how to read the results.
#
#   bash benchmarks/gpu.sh [OUT] [SECONDS]
#
# 1 the gpu tests, in parallel processes, while others compile what is timed later; 2 times of the ops against PyTorch;
# 3 the tuner's ranking; 4 whole models at batch 1 and 32; 5 a training step; 6 a profile; 7 plots.
#
# Installs nothing: PyTorch, Triton and the requirements of segmenter-fast must be installed, segmenter-fast need not be;
# the tests also need pytest. Results go to OUT/<device>/ (default: $OUT, else benchmarks/results) as soon as they exist,
# and after each step into results.tar.gz there. SECONDS (default 480) is the time for all of it; a step gets a part of
# what is left.
# DEVICE=cpu rehearses the same steps without a GPU on very small cases and without torch.compile, to test the script
# itself; its figures mean nothing, and OUT must be given.
# Exit code: 0; 1 if a step failed (the others still ran); 2 without a GPU, or for arguments that make no sense.
set -uo pipefail

stop() {
    echo "gpu.sh: $1" >&2
    exit 2
}

device=${DEVICE:-cuda}
out=${1:-${OUT:-}}
budget=${2:-480}
start=$(date +%s)
failed=()
case $device in
    cuda) ;;
    cpu) [ -n "$out" ] || stop "DEVICE=cpu is a rehearsal; name a folder for its results: DEVICE=cpu bash benchmarks/gpu.sh OUT" ;;
    *) stop "DEVICE must be cuda or cpu, got $device" ;;
esac
[[ $budget =~ ^[1-9][0-9]*$ ]] || stop "SECONDS must be a whole number above 0, got $budget"
[[ -z $out || $out == /* ]] || out=$PWD/$out  # relative to the caller's folder
cd "$(dirname "$0")/.." || exit 2
out=${out:-$PWD/benchmarks/results}

python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
"$python" -c "import sys, torch; sys.exit(3 if '$device' == 'cuda' and not torch.cuda.is_available() else 0)" 2>/dev/null
case $? in
    0) ;;
    3) stop "no GPU: PyTorch sees no CUDA or ROCm device here, so nothing was run" ;;
    *) stop "$python has no PyTorch; set PYTHON to one that has" ;;
esac
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"  # a checkout can be imported as it is
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export TORCHINDUCTOR_CACHE_DIR=$scratch/compiled
mkdir "$TORCHINDUCTOR_CACHE_DIR"

elapsed() { echo $(($(date +%s) - start)); }

# part PERCENT [RESERVE]: a part of the seconds that are left, less one in RESERVE of all for the profile and the plots.
part() { echo $(((budget - $(elapsed) - budget / ${2:-8}) * $1 / 100)); }

# step NAME LIMIT COMMAND...: runs the command for at most LIMIT seconds, keeps its output and remembers a failure.
step() {
    local name=$1 limit=$2
    shift 2
    if [ "$limit" -lt 5 ]; then
        echo "== $name: no time left"
        failed+=("$name")
        return
    fi
    echo "== $name (at $(elapsed) s, for $limit s)"
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$results/$name.log"
    local code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
        echo "== $name: exit code $code"
        failed+=("$name")
    fi
    tar --exclude=results.tar.gz -czf "$scratch/results.tar.gz" -C "$out" "$slug"
    mv "$scratch/results.tar.gz" "$results/"
}

# timed NAME PERCENT COMMAND...: a step with a budget, after which it begins nothing new and has 20 s to end.
timed() {
    local name=$1 time
    time=$(part "$2")
    shift 2
    step "$name" $((time < 5 ? time : time + 20)) "$@" --budget "$time"
}

record=$("$python" -m segmenter_fast.benchmarks.device "$device") || exit 2
echo "$record"
slug=$(awk '$1 == "slug" { print $2 }' <<<"$record")
memory=$(awk '$1 == "memory_bytes" { print int($2 / 6e9) }' <<<"$record")
memory=${memory:-1}
results=$out/$slug
mkdir -p "$results"

cores=$(nproc)
bench=("$python" -m segmenter_fast.cli bench)
ops=(attention upsample_cross_entropy upsample_argmax upsample_softmax mask_scores)
if [ "$device" = cuda ]; then
    mapfile -t tests < <(grep -rlwE 'mark\.gpu|backend' tests --include='test_*.py')
    tests+=(-m gpu)
    models=(--no-extras --seconds 1)
    for variant in seg_b_mask_16 seg_s_mask_16 seg_t_mask_16 seg_l_mask_16 seg_b_mask_8; do models+=(--variant "$variant"); done
    kernels=("${ops[@]}") training=() whole=(--no-compile)
    most=$((memory < 12 ? memory : 12))
else
    tests=(tests/benchmarks/test_compare.py)
    models=(--variant seg_t_linear_16 --size 64 --classes 7 --dtype float32 --no-compile --no-extras --seconds 0.1)
    training=(--quick --size 64 --classes 7 --dtype float32 --no-compile)
    whole=(--model t --size 64 --classes 7 --dtype float32 --no-compile)
    kernels=(mask_scores --quick)
    most=2
    export TORCHDYNAMO_DISABLE=1
fi
processes=$((cores * 5 / 8 < most ? cores * 5 / 8 : most))
processes=$((processes < 1 ? 1 : processes))

limit=$(part 30)
if [ "$device" = cuda ]; then
    OMP_NUM_THREADS=1 timeout --signal=KILL "$limit" "$python" -m segmenter_fast.benchmarks.warm --device "$device" \
        --processes $((cores * 3 / 8 < 1 ? 1 : cores * 3 / 8)) >"$results/warm.log" 2>&1 &
fi
OMP_NUM_THREADS=2 step tests $((limit < 5 ? limit : limit + 10)) "$python" tests/support/parallel.py --processes "$processes" --seconds "$limit" \
    --out "$results/tests" "${tests[@]}"
wait
# Choices of the compiler while the tests used the device; the timed runs choose again.
find "$TORCHINDUCTOR_CACHE_DIR" -name '*.best_config' -delete

timed kernels 20 "${bench[@]}" kernels "${kernels[@]}" --device "$device" --out "$out"
if [ "$device" = cuda ]; then timed tune 13 "$python" -m segmenter_fast.benchmarks.tune "${ops[@]}"; fi
timed throughput 68 "${bench[@]}" "${models[@]}" --device "$device" --out "$out"
timed training 100 "${bench[@]}" train "${training[@]}" --device "$device" --out "$out"
step profile "$(part 100 32)" "$python" -m segmenter_fast.benchmarks.profiler --device "$device" --out "$out" "${whole[@]}"
step plots 30 "$python" -m segmenter_fast.benchmarks.plots "$results"

echo "== results in $results after $(elapsed) s"
ls -l "$results"
if [ ${#failed[@]} -gt 0 ]; then
    echo "== failed: ${failed[*]}"
    exit 1
fi
