#!/bin/sh
# Tests the best network of every finished trial: one CSV per experiment.
#
#     EXPERIMENTS="time_frequency esc50" sh run_test_predictions.sh
#
# Exit code 1: one could not be tested, which was said, and the others were.
set -eu
trap 'exit 130' INT
here=$(cd "$(dirname "$0")" && pwd)
. "$here/python_env.sh"
status=0
for name in ${EXPERIMENTS:-audio_mnist time_frequency esc50}; do
    "$PYTHON" "$here/predict_test.py" --dataset_name="$name" \
        --ray_results_dir="${RAY_RESULTS_DIR:-$here/ray_results}" --data_base_dir="${DATA_DIR:-$here/data}" "$@" ||
        status=$?
done
exit "$status"
