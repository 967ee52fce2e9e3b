#!/bin/sh
# Trains the experiments of the paper, one after the other; run again, it continues what was interrupted.
#
#     EXPERIMENTS="time_frequency esc50" NUM_SAMPLES=10 MAX_EPOCHS=1000 sh run_experiments.sh [flags of main.py]
#
# Exit code 3: all of them ran, but some trials failed; what went wrong was said, and the next run tries them again.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/python_env.sh"
status=0
for name in ${EXPERIMENTS:-audio_mnist time_frequency esc50}; do
    "$PYTHON" "$here/main.py" --name="$name" --num_samples="${NUM_SAMPLES:-1}" --max_epochs="${MAX_EPOCHS:-1000}" \
        --ray_root_dir="${RAY_RESULTS_DIR:-$here/ray_results}" --data_dir="${DATA_DIR:-$here/data}" "$@" || status=$?
    case $status in 0 | 3) ;; *) exit "$status" ;; esac
done
exit "$status"
