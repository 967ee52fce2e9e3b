#!/bin/sh
# Tests the best network of every finished trial: one CSV per experiment.
#
#     EXPERIMENTS="time_frequency esc50" sh run_test_predictions.sh
#
# Exit codes: 1 an experiment could not be tested, which was said, and the others were; 130
# interrupted.
set -eu
trap 'exit 130' INT
here=$(cd "$(dirname "$0")" && pwd)
. "$here/python_env.sh"

refused=
for name in ${EXPERIMENTS:-audio_mnist time_frequency esc50}; do
    status=0
    "$PYTHON" "$here/predict_test.py" --dataset_name="$name" \
        --ray_results_dir="${RAY_RESULTS_DIR:-$here/ray_results}" \
        --data_base_dir="${DATA_DIR:-$here/data}" "$@" || status=$?
    case $status in
    0) ;;
    130) exit 130 ;;
    *) refused="$refused $name" ;;
    esac
done

if [ -n "$refused" ]; then
    echo "run_test_predictions.sh: not tested, as said above:$refused." >&2
    exit 1
fi
