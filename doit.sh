#!/bin/sh
# The whole reproduction, from the download to tables and figures:
#
#     sh doit.sh          the three experiments of the paper
#     sh doit.sh quick    time_frequency alone, 40 epochs, no download: some minutes on two cores
#
# Both keep their results in ray_results: after a first look with quick, sh doit.sh trains the same
# trials further. Run it again after an interruption: it continues. Settings, from the environment:
# EXPERIMENTS, NUM_SAMPLES, MAX_EPOCHS, DATA_DIR, RAY_RESULTS_DIR, ESC50_URL, AUDIO_MNIST_URL, see
# README.md.
set -eu
trap 'exit 130' INT
here=$(cd "$(dirname "$0")" && pwd)

case "$*" in
"") : "${EXPERIMENTS:=audio_mnist time_frequency esc50}" ;;
quick)
    : "${EXPERIMENTS:=time_frequency}"
    : "${MAX_EPOCHS:=40}"
    ;;
*)
    echo "doit.sh: unknown argument '$*': the only one is quick." >&2
    exit 1
    ;;
esac
: "${MAX_EPOCHS:=1000}"
: "${NUM_SAMPLES:=1}"
: "${DATA_DIR:=$here/data}"
: "${RAY_RESULTS_DIR:=$here/ray_results}"
export EXPERIMENTS RAY_RESULTS_DIR MAX_EPOCHS NUM_SAMPLES DATA_DIR
case $RAY_RESULTS_DIR in
*://*)
    echo "doit.sh: RAY_RESULTS_DIR=$RAY_RESULTS_DIR must be a folder; the other scripts take a URI." >&2
    exit 1
    ;;
esac

echo "Experiments: $EXPERIMENTS; runs: $NUM_SAMPLES; epochs at most: $MAX_EPOCHS"
echo "Needs: 6 GB of disk for the Python packages, 8 GB for recordings and results," \
    "2 GB of memory and 2 GB for each trial at a time."
disk=$(df -Pk "$here" | awk 'NR == 2 {printf "%d", $4 / 1048576}')
echo "Has: $disk GB of disk free."

. "$here/python_env.sh"
PYTHONPATH="$here" "$PYTHON" - <<'PYTHON'
import sys, machine, torch
from config import InputError
try:
    machine.check_driver()
except InputError as error:
    sys.exit(f"doit.sh: {error}")
print(f"May use: {machine.cpus()} CPUs, {machine.free_memory() // 2**30} GB of memory.")
if torch.cuda.is_available():
    print(f"Trains on {torch.cuda.get_device_name()}, several trials at a time.")
else:
    print("Trains on the CPUs: there is no CUDA device.")
PYTHON

# Which recordings an experiment needs follows from its search space. One that is not there is
# refused by run_experiments.sh.
# shellcheck disable=SC2086 # a list of names
names=$(
    PYTHONPATH="$here" "$PYTHON" - $EXPERIMENTS <<'PYTHON'
import contextlib, sys
from config import InputError, read_search_space
for name in sys.argv[1:]:
    with contextlib.suppress(InputError):
        print(read_search_space(name, 1)["dataset_name"])
PYTHON
)
datasets=
for name in audio_mnist esc50; do
    if printf '%s\n' "$names" | grep -qx "$name"; then datasets="$datasets $name"; fi
done
if [ -n "$datasets" ]; then
    echo "== Data"
    # shellcheck disable=SC2086 # a list of names
    sh "$here/download_data.sh" $datasets
fi

echo "== Experiments"
trained=0
sh "$here/run_experiments.sh" || trained=$?
case $trained in 0 | 1 | 3) ;; *) exit "$trained" ;; esac

echo "== Test predictions"
tested=0
sh "$here/run_test_predictions.sh" || tested=$?
case $tested in 0 | 1) ;; *) exit "$tested" ;; esac

echo "== Convergence rate"
rates=
[ "$*" != quick ] || rates="--rates 30 --rates_not_normalized 0.1 --n_signals 5"
# shellcheck disable=SC2086 # flags
"$PYTHON" "$here/convergence_rate.py" $rates --output_dir="$RAY_RESULTS_DIR/convergence_rate"

echo "== Tables"
"$PYTHON" "$here/produce_tables.py" --ray_results_dir="$RAY_RESULTS_DIR" \
    --csv="$RAY_RESULTS_DIR/tables.csv" >"$RAY_RESULTS_DIR/tables.txt.tmp"
mv "$RAY_RESULTS_DIR/tables.txt.tmp" "$RAY_RESULTS_DIR/tables.txt"
cat "$RAY_RESULTS_DIR/tables.txt"

echo "== Figures"
"$PYTHON" "$here/produce_figures.py" --ray_results_dir="$RAY_RESULTS_DIR" \
    --data_base_dir="$DATA_DIR" --output_dir="$RAY_RESULTS_DIR/figures"

echo "== Results"
echo "$RAY_RESULTS_DIR/tables.txt"
echo "$RAY_RESULTS_DIR/tables.csv"
echo "$RAY_RESULTS_DIR/figures"
echo "$RAY_RESULTS_DIR/convergence_rate"
for name in $EXPERIMENTS; do
    for file in "$RAY_RESULTS_DIR/$name/$name.csv" "$RAY_RESULTS_DIR/$name/experiment.json"; do
        [ ! -e "$file" ] || echo "$file"
    done
done

case $trained in
1) echo "doit.sh: some experiments were not trained to the end, see above." >&2 ;;
3) echo "doit.sh: some trials failed, see above; run it again to try them once more." >&2 ;;
esac
[ "$trained" = 0 ] || exit "$trained"
exit "$tested"
