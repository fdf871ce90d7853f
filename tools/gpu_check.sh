#!/usr/bin/env bash
# Everything that some minutes of a GPU should be used for, in one command. First what finds out
# most (tools/gpu_check.py): cuDNN and step times; captured against eager; growth; five networks
# together; the choice of a format; a quick unit of each chapter; four processes on one GPU. Then
# the tests that need CUDA, the speed benchmark's GPU column, and `jahs record --profile gpu` for
# the time that is left. Ends with a table of what ran. On a CPU: JAHS_DEVICE=cpu, at toy size.
#
#   tools/gpu_check.sh [--seconds 530] [--profile gpu] [--wheels DIR]
#       [--parts "engine capture growth together formats units processes cuda speed record"]
#
# OUT (_build/gpu) gets one text per part, table.txt, and results.tar.gz with the rows: unpack it in
# the checkout (tar -xzf) to have them on record. PYTHON names the interpreter (python3).
#
# What it needs: Python 3.11 to 3.13 with torch, torchvision, numpy, pandas, scipy, scikit-learn
# (brings joblib), pillow, typer and pyyaml; the book itself need not be installed, nothing else
# need be there, and nothing is downloaded. For more: pytest and hypothesis (the tests), ConfigSpace
# (chapters 01 and 02), matplotlib (chapters 03 and 05), lightning (one line of the benchmark).
# Whatever is missing is named in one line each, and what needs it is left out. Where pip
# reaches nothing, bring wheels along: elsewhere, for the machine's Python and system,
#   pip download --only-binary=:all: --no-deps -d DIR NAME==VERSION ...
# and name the folder with --wheels: they are unpacked into OUT/site and come first in PYTHONPATH.
# Data: JAHS_DATA names a folder with Fashion-MNIST and CIFAR-10 (see `jahs data list`); without
# them the benchmark fails, and `jahs record` leaves out what needs them.

set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
seconds=530 profile=gpu parts="engine capture growth together formats units processes cuda speed record" wheels=
while [ $# -gt 0 ]; do
    case $1 in
        --seconds) seconds=${2-} ;;
        --profile) profile=${2-} ;;
        --parts) parts=${2-} ;;
        --wheels) wheels=${2-} ;;
        *) echo "gpu_check.sh: unknown option $1: choose one of --seconds, --profile, --parts, --wheels" >&2; exit 2 ;;
    esac
    [ $# -ge 2 ] || { echo "gpu_check.sh: $1 needs a value" >&2; exit 2; }
    shift 2
done
[[ $seconds =~ ^[0-9]+$ ]] || { echo "gpu_check.sh: --seconds must be a whole number, got $seconds" >&2; exit 2; }

python=${PYTHON:-python3}
mkdir -p "${OUT:-_build/gpu}" || exit 2
out=$(cd "${OUT:-_build/gpu}" && pwd)
table=$out/table.txt
book=${JAHS_BOOK:-$PWD}
end=$((SECONDS + seconds))
export JAHS_CACHE=${JAHS_CACHE:-$out/cache} JAHS_PROGRESS=0 PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
touch "$out/.start"

if [ -n "$wheels" ]; then
    for wheel in "$wheels"/*.whl; do  # a wheel is a zip archive: this needs no pip
        "$python" -m zipfile -e "$wheel" "$out/site" || { echo "gpu_check.sh: $wheel cannot be unpacked" >&2; exit 2; }
    done
    PYTHONPATH=$out/site:$PYTHONPATH
    echo "wheels of $wheels are in use"
fi

"$python" - <<'PYTHON'
from importlib.util import find_spec

needs = {
    "everything": "torch torchvision numpy pandas scipy sklearn joblib filelock PIL",
    "jahs record": "typer yaml",
    "the tests": "pytest hypothesis",
    "chapters 01 and 02": "ConfigSpace",
    "chapters 03 and 05": "matplotlib",
    "one line of the benchmark": "lightning",
}
for what, names in needs.items():
    for name in names.split():
        if find_spec(name) is None:
            print(f"missing: {name}, needed for {what}: see the head of this script")
PYTHON

printf '%-9s %6s %8s  %s\n' part status seconds 'last line' >"$table"

# run NAME LIMIT COMMAND...: the command within its limit and what is left of the whole
run() {
    local name=$1 limit=$2 begin=$SECONDS status last
    shift 2
    [[ " $parts " == *" $name "* ]] || return 0
    limit=$((limit < end - SECONDS ? limit : end - SECONDS))
    if [ "$limit" -lt 5 ]; then
        printf '%-9s %6s %8s  %s\n' "$name" - 0 'no time left' >>"$table"
        return 0
    fi
    echo "$name: at most $limit s, output in $out/$name.txt"
    timeout -k 5 "$limit" "$@" >"$out/$name.txt" 2>&1
    status=$?
    last=$(grep -v '^[[:space:]]*$' "$out/$name.txt" | tail -n 1 | cut -c 1-90)
    [[ $status =~ ^(124|137)$ ]] && last="ended after $limit s: $last"
    printf '%-9s %6s %8s  %s\n' "$name" $status $((SECONDS - begin)) "$last" >>"$table"
}

test="$python -m pytest -p no:cacheprovider --tb=short --continue-on-collection-errors"
check="$python tools/gpu_check.py"
run engine 60 $check engine
run capture 60 $check capture
run growth 25 $check growth
run together 25 $check together
run formats 20 $check formats
run units 90 $check units --seconds 75
run processes 50 $check processes
run cuda 60 $test -k "cuda or gpu" $(grep -liE "cuda" tests/test_*.py)
run speed 90 "$python" benchmarks/training.py --record --rounds 1 --share 0.3
left=$((end - SECONDS - 10))
run record $((left + 5)) "$python" -m jahs_utils.cli record --profile "$profile" --limit-seconds $((left > 0 ? left : 0))

(cd "$book" && mkdir -p results && find results -name '*.jsonl' -newer "$out/.start" -print0 | tar -czf "$out/results.tar.gz" --null -T -)
echo
cat "$table"
echo "rows: $out/results.tar.gz"
