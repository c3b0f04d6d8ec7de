#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the gpu tests, the kernel benchmarks, the plots.
#
#   bash benchmarks/gpu.sh [OUT] [SECONDS]
#
# Installs nothing: PyTorch, Triton and pytest have to be there, segmenter-fast itself does not. Results go to
# OUT/<device>/ (default: $OUT, else benchmarks/results), each as soon as it exists, the most valuable first.
# SECONDS (default 480) is the time for all of it; the tests get at most a third.
# Exit code: 0; 1 if a step failed (the others still ran); 2 without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
out=${1:-${OUT:-benchmarks/results}}
budget=${2:-480}
start=$SECONDS
failed=()

python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
if ! "$python" -c "import torch" 2>/dev/null; then
    echo "gpu.sh: $python has no PyTorch; set PYTHON to one that has" >&2
    exit 2
fi
if ! "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())"; then
    echo "gpu.sh: no GPU: PyTorch sees no CUDA or ROCm device here, so nothing was run" >&2
    exit 2
fi
if ! "$python" -c "import segmenter_fast.benchmarks" 2>/dev/null; then
    # Not installed: the same layout, in links.
    tree=$PWD/build/gpu
    rm -rf "$tree" && mkdir -p "$tree/segmenter_fast"
    ln -s "$PWD"/segmenter_fast/* "$PWD/kernels" "$PWD/train" "$PWD/benchmarks" "$tree/segmenter_fast/"
    export PYTHONPATH="$tree${PYTHONPATH:+:$PYTHONPATH}"
fi

left() { echo $((budget - (SECONDS - start))); }

# step NAME LIMIT COMMAND...: runs the command for at most LIMIT seconds and remembers a failure.
step() {
    local name=$1 limit=$2
    shift 2
    if [ "$limit" -lt 10 ]; then
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

"$python" -m segmenter_fast.benchmarks.device || exit 2
slug=$("$python" -m segmenter_fast.benchmarks.device --slug)
results=$out/$slug
mkdir -p "$results"

step tests $((budget / 3)) "$python" -m pytest -m gpu -q --junitxml "$results/tests.xml"
# Half of what is left is attention's, the other ops share the rest; half a minute is kept for the plots.
# A benchmark stops by itself at its budget, after the case it is in.
for op in attention upsample_cross_entropy upsample_argmax upsample_softmax mask_scores; do
    case $op in
        upsample_cross_entropy) part=4 ;; upsample_argmax) part=3 ;; attention | upsample_softmax) part=2 ;; *) part=1 ;;
    esac
    time=$((($(left) - 30) / part))
    step "$op" $((time + 30)) "$python" -m segmenter_fast.benchmarks.kernels "$op" \
        --device cuda --budget "$time" --out "$out"
done
step plots 60 "$python" -m segmenter_fast.benchmarks.plots "$results"

echo "== results in $results after $((SECONDS - start)) s"
ls -l "$results"
if [ ${#failed[@]} -gt 0 ]; then
    echo "== failed: ${failed[*]}"
    exit 1
fi
