#!/usr/bin/env bash
# The first minutes on a machine with an NVIDIA GPU: wheels, installation, tests, then steps in order of value.
#
#   benchmarks/gpu/first.sh wheels          # where there is a network: what a GPU machine may lack, into build/gpu-wheels
#   benchmarks/gpu/first.sh run             # on the GPU machine, which needs torch for CUDA and no network; again to go on
#   benchmarks/gpu/first.sh --dry-run       # anywhere: builds and installs wheels, prints the calls, runs steps with an imitated GPU
#
# PYTHON_OF_GPU (3.12) with `wheels` is that machine's Python; LACKING="..." where its image lacks other packages.
# With `run`: SECONDS_LEFT (540) bounds it; RESULTS (benchmarks/gpu) is where lines are written, and read from; TESTS is an expression for
# pytest's -k, or `none`, as in a second call; FROM (1) the first step. Every form is in a file of this GPU as soon as it is timed;
# report.py makes tables of them anywhere.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
WHEELS=build/gpu-wheels
SITE=$PWD/build/gpu-site
PYTHON_OF_GPU=${PYTHON_OF_GPU:-3.12}
SECONDS_LEFT=${SECONDS_LEFT:-540}
RESULTS=${RESULTS:-benchmarks/gpu}
# What images with torch for CUDA were seen without. torch itself is the machine's own.
LACKING=${LACKING:-diffusers importlib-metadata pydantic pydantic-core annotated-types typing-inspection ruamel.yaml torch-pruning torchao nvmath-python}
# Minutes that a step is expected to take on an H100, and its script with what it is called with.
WHOLE="lowering.py --whole --no-autotune --cells"
STEPS=(
    "4 $WHOLE dit-xl,64"
    "3 $WHOLE uvit-h,16"
    "4 $WHOLE dit-xl,16"
    "4 $WHOLE uvit-h,64"
    "2 training.py --forms as,written --cells dit-xl,32"
    "2 lowering.py --whole --no-autotune --backends cusparselt-direct --cells uvit-h,16"
    "1 by_kernel.py"
    "4 lowering.py --no-autotune --cells uvit-h,16"
    "4 lowering.py --whole --forms ^dense --cells dit-xl,64"
    "4 lowering.py --cells dit-xl,64"
    "3 $WHOLE uvit-h,1"
    "3 $WHOLE dit-xl,1"
    "3 $WHOLE uvit-l,64"
    "3 $WHOLE uvit-s,64"
    "3 $WHOLE ddpm-cifar10,64"
    "8 training.py --cells dit-xl,128"
    "6 training.py --cells uvit-h,128"
    "5 by_kernel.py --cells dit-xl,64"
)
IMITATED=(0 7 4) # of these in a dry run

wheels() {
    rm -rf "$WHEELS"
    mkdir -p "$WHEELS"
    "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$WHEELS" .
    # shellcheck disable=SC2086
    "$PYTHON" -m pip download --quiet --no-deps --only-binary :all: --dest "$WHEELS" -c constraints.txt --python-version "$PYTHON_OF_GPU" $LACKING
    echo "$(ls "$WHEELS" | wc -l) wheels, $(du -sh "$WHEELS" | cut -f1), in $WHEELS; the files of this repository beside them: $(git ls-files -z | du -ch --files0-from=- | tail -1 | cut -f1)"
}

# Into a folder of their own: an environment made from another one would not see its torch.
install() {
    local source file
    if ! "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$WHEELS"/*.whl; then
        echo "wheels of another Python? Make them anew: PYTHON_OF_GPU=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') $0 wheels" >&2
        exit 1
    fi
    for source in compressor compressor/plugins=plugins compressor/model_zoo=model_zoo; do
        while read -r file; do
            cmp -s "${source#*=}/$file" "$SITE/${source%%=*}/$file" && continue
            echo "$WHEELS has other code than ${source#*=}/$file: make the wheels anew" >&2
            exit 1
        done < <(cd "${source#*=}" && find . -name '*.py')
    done
    export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
    if ! (cd / && "$PYTHON" -c "import compressor.cli, diffusers, matplotlib, pytest, pytest_timeout, hypothesis"); then
        echo "add what is missing to LACKING=\"$LACKING\" and make the wheels anew" >&2
        exit 1
    fi
    (cd / && "$PYTHON" -c "import nvmath.bindings.cusparseLt" 2> /dev/null) || echo "nvmath does not load: no cusparselt-direct"
}

# The tests of a GPU, against what is installed: the folder of the checkout has no methods and no models.
tests() {
    COMPRESSOR_SEARCH_SECONDS=5 PYTHONSAFEPATH=1 timeout --kill-after 10 150 "$PYTHON" -m pytest -vv -m gpu -o pythonpath=tests -p no:benchmark -p no:cacheprovider "$@" tests/test_gpu.py tests/test_optimizers.py
}

left() { echo $((end - $(date +%s) - ${1:-15})); }

# A step's script, each word with its commas as spaces. It goes on after what ended the process (a signal), or left the GPU without
# an answer (3), but not for ever.
step() {
    local script=$1 call=() bound word ended=0
    shift
    for word in "$@"; do
        call+=("${word//,/ }")
    done
    for _ in 1 2 3; do
        [ "$(left)" -ge 60 ] || return 0
        bound=()
        [ "$script" = by_kernel.py ] || bound=(--seconds "$(left 45)") # a form takes half a minute
        echo "--- $script ${call[*]} ${bound[*]}"
        timeout --kill-after 10 "$(left)" "$PYTHON" "benchmarks/gpu/$script" "${call[@]}" "${bound[@]}" --out "$RESULTS" && return 0 || ended=$?
        echo "it ended with $ended"
        [ "$ended" = 3 ] || [ "$ended" -ge 128 ] || return 0
    done
}

run() {
    end=$(($(date +%s) + SECONDS_LEFT))
    mkdir -p "$RESULTS"
    : >> "$RESULTS/steps.log" # where nothing can be written, nothing is begun
    [ "$RESULTS" -ef benchmarks/gpu ] || cp -n benchmarks/gpu/{lowering,training,kernels}_*.jsonl "$RESULTS"/ 2> /dev/null || true
    install
    "$PYTHON" -c "import torch; torch.zeros(1, device='cuda').item(); print(torch.cuda.get_device_name(), torch.__version__)"
    # One after the other, each said as it passes: those that are not reached are known. A failure is no end, as each form is compared.
    [ "${TESTS:-}" = none ] || tests -k "${TESTS:-}" 2>&1 |
        tee "$RESULTS/tests.log" || echo "tests ended with ${PIPESTATUS[0]}: read them before any figure is used"
    for one in "${STEPS[@]:$((${FROM:-1} - 1))}"; do
        [ "$(left)" -ge 60 ] || { echo "no time left for: $one; the same call again goes on" && continue; }
        # shellcheck disable=SC2086
        step ${one#* } 2>&1 | tee -a "$RESULTS/steps.log"
    done
}

case "${1:-}" in
wheels) wheels ;;
run) run ;;
--dry-run)
    if [ -x .venv/bin/python ] && ! "$PYTHON" -c "import torch" 2> /dev/null; then
        PYTHON=$PWD/.venv/bin/python # what `make` has made
    fi
    RESULTS=$(mktemp -d)
    trap 'rm -rf "$RESULTS"' EXIT
    WHEELS=$RESULTS/wheels SITE=$RESULTS/site # not in the place of those for a GPU machine, of another Python
    PYTHON_OF_GPU=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    wheels
    (install && tests --collect-only | tail -1)
    echo "pytest -m gpu tests: 150 seconds at most"
    for number in "${!STEPS[@]}"; do
        echo "$((number + 1)). ${STEPS[number]#* }: about ${STEPS[number]%% *} minutes"
    done
    end=$(($(date +%s) + 600))
    for number in "${IMITATED[@]}"; do
        # shellcheck disable=SC2086
        step ${STEPS[number]#* } --imitate
    done
    "$PYTHON" benchmarks/gpu/report.py --lines "$RESULTS/lowering_imitated.jsonl" --training "$RESULTS/training_imitated.jsonl" --page "${DRY_PAGE:-build/gpu.md}" --plot "${DRY_PLOT:-build/gpu.svg}"
    ;;
*)
    sed -n '2,12p' "$0" >&2
    exit 2
    ;;
esac
