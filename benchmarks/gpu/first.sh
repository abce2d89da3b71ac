#!/usr/bin/env bash
# The first minutes on a machine with an NVIDIA GPU: wheels, installation, tests, then cells in order of value.
#
#   benchmarks/gpu/first.sh wheels          # where there is a network: what a GPU machine may lack, into build/gpu-wheels
#   benchmarks/gpu/first.sh run             # on the GPU machine, which needs torch for CUDA and no network; again to go on
#   benchmarks/gpu/first.sh --dry-run       # anywhere: builds the wheels, prints the calls, runs the steps with an imitated GPU
#
# PYTHON_OF_GPU=3.12 with `wheels`, where that machine's Python is another one. SECONDS_LEFT (default 2400) bounds `run`. Every form is in benchmarks/gpu/lowering.jsonl as soon as it is timed.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
WHEELS=build/gpu-wheels
ENVIRONMENT=${ENVIRONMENT:-.venv-gpu}
SECONDS_LEFT=${SECONDS_LEFT:-2400}
# What images with torch for CUDA were seen without. torch itself is the machine's own.
LACKING="accelerate psutil diffusers importlib-metadata zipp regex requests charset-normalizer idna urllib3 certifi huggingface-hub httpx
httpcore h11 anyio sniffio hf-xet tqdm pyyaml filelock fsspec packaging einops jinja2 markupsafe matplotlib contourpy cycler fonttools
kiwisolver pyparsing python-dateutil six numpy pillow pydantic pydantic-core annotated-types typing-inspection typing-extensions rich
markdown-it-py mdurl pygments ruamel.yaml safetensors torch-pruning click scipy pytest hypothesis sortedcontainers iniconfig pluggy
nvmath-python cuda-bindings cuda-core cuda-pathfinder torchao"
# Cells in order of value, and the minutes that each is expected to take on an H100 with compiled forms.
TRAINING=("dit-xl 128:4" "uvit-h 128:4" "uvit-s 128:2" "dit-xl 32:3")
CELLS=("dit-xl 64:7" "uvit-h 16:7" "dit-xl 16:6" "uvit-h 64:7" "uvit-h 1:5" "dit-xl 1:5" "uvit-l 64:5" "uvit-s 64:4" "ddpm-cifar10 64:5")
KERNELS="dit-xl 64,uvit-h 16"

wheels() {
    mkdir -p "$WHEELS"
    "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$WHEELS" .
    # shellcheck disable=SC2086
    "$PYTHON" -m pip download --quiet --no-deps --only-binary :all: --dest "$WHEELS" -c constraints.txt ${PYTHON_OF_GPU:+--python-version "$PYTHON_OF_GPU"} $LACKING
    echo "$(ls "$WHEELS" | wc -l) wheels, $(du -sh "$WHEELS" | cut -f1), in $WHEELS"
}

install() {
    test -x "$ENVIRONMENT/bin/python" || "$PYTHON" -m venv --system-site-packages "$ENVIRONMENT"
    # What the machine has already stays: it belongs together with its torch.
    "$ENVIRONMENT/bin/python" - "$WHEELS"/*.whl << 'END' | xargs -r "$ENVIRONMENT/bin/python" -m pip install --quiet --no-index --no-deps --force-reinstall
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
for wheel in sys.argv[1:]:
    name = Path(wheel).name.split("-")[0]
    try:
        lacking = name == "diffusion_compressor" or not version(name)
    except PackageNotFoundError:
        lacking = True
    if lacking:
        print(wheel)
END
}

calls() {
    echo "pytest -m gpu tests: 6 minutes at most; no cell is measured where they fail"
    for cell in "${CELLS[@]}"; do
        echo "lowering.py --cells \"${cell%:*}\": about ${cell#*:} minutes"
    done
    for cell in "${TRAINING[@]}"; do
        echo "training.py --cells \"${cell%:*}\": about ${cell#*:} minutes"
    done
    echo "kernels.py --cells \"$KERNELS\": about 3 minutes"
    echo "report.py: docs/gpu.md from what was measured"
}

run() {
    end=$(($(date +%s) + SECONDS_LEFT))
    install
    export HF_HUB_OFFLINE=1
    # The folder `compressor` that lies here is not the installed package, and a plugin of the machine may warn, which is an error here.
    PYTHONSAFEPATH=1 timeout 360 "$ENVIRONMENT/bin/python" -m pytest -q -m gpu -p no:benchmark tests/test_gpu.py tests/test_optimizers.py
    for cell in "${CELLS[@]}"; do
        left=$((end - $(date +%s) - 30))
        if [ "$left" -lt 60 ]; then
            echo "no time left: the same call again goes on"
            break
        fi
        "$ENVIRONMENT/bin/python" benchmarks/gpu/lowering.py --cells "${cell%:*}" --seconds "$left"
    done
    for cell in "${TRAINING[@]}"; do
        left=$((end - $(date +%s) - 30))
        if [ "$left" -ge 60 ]; then
            "$ENVIRONMENT/bin/python" benchmarks/gpu/training.py --cells "${cell%:*}" --seconds "$left"
        fi
    done
    left=$((end - $(date +%s) - 30))
    if [ "$left" -ge 180 ]; then
        timeout "$left" "$ENVIRONMENT/bin/python" benchmarks/gpu/kernels.py --cells "$KERNELS" || echo "kernels.py did not end"
    fi
    "$ENVIRONMENT/bin/python" benchmarks/gpu/report.py
}

case "${1:-}" in
wheels) wheels ;;
run) run ;;
--dry-run)
    if [ -x .venv/bin/python ] && ! "$PYTHON" -c "import torch" 2> /dev/null; then
        PYTHON=.venv/bin/python  # what `make` has made
    fi
    wheels
    calls
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    for cell in "${CELLS[@]:0:2}"; do
        "$PYTHON" benchmarks/gpu/lowering.py --imitate --cells "${cell%:*}" --out "$folder/lowering.jsonl"
    done
    "$PYTHON" benchmarks/gpu/training.py --imitate --cells "${TRAINING[0]%:*}" --out "$folder/training.jsonl"
    "$PYTHON" benchmarks/gpu/report.py --lines "$folder/lowering.jsonl" --training "$folder/training.jsonl" --page "${DRY_PAGE:-build/gpu.md}" --plot "${DRY_PLOT:-build/gpu.svg}"
    ;;
*)
    sed -n '2,9p' "$0" >&2
    exit 2
    ;;
esac
