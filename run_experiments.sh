#!/bin/sh
# Trains the experiments of the paper, one after the other. Run it again after an edit of
# search_spaces.py or an interruption: it trains what is new or not finished.
#
#     EXPERIMENTS="time_frequency esc50" NUM_SAMPLES=10 MAX_EPOCHS=1000 sh run_experiments.sh [flags of main.py]
#
# Exit codes: 1 an experiment was refused, 3 some trials failed, which was said and the other
# experiments ran; 130 interrupted.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
. "$here/python_env.sh"
trap : INT # main.py, which gets Ctrl-C too, ends with 130 and says what it leaves

restart=
dry_run=
for flag in "$@"; do
    case $flag in
    --restart) restart=yes ;;
    --dry_run) dry_run=yes ;;
    esac
done
experiments=${EXPERIMENTS:-audio_mnist time_frequency esc50}
if [ -n "$restart" ] && [ -z "$dry_run" ]; then
    echo "run_experiments.sh: --restart moves aside: $experiments"
fi

refused=
failed=
interrupted=
later=
for name in $experiments; do
    if [ -n "$interrupted" ]; then
        later="$later $name"
        continue
    fi
    status=0
    "$PYTHON" "$here/main.py" --name="$name" --num_samples="${NUM_SAMPLES:-1}" \
        --max_epochs="${MAX_EPOCHS:-1000}" --ray_root_dir="${RAY_RESULTS_DIR:-$here/ray_results}" \
        --data_dir="${DATA_DIR:-$here/data}" "$@" || status=$?
    case $status in
    0) ;;
    3) failed="$failed $name" ;;
    130) interrupted=$name ;;
    *) refused="$refused $name" ;;
    esac
done

if [ -n "$failed" ]; then
    echo "run_experiments.sh: trials failed, as said above:$failed." >&2
fi
if [ -n "$refused" ]; then
    echo "run_experiments.sh: not trained to the end, as said above:$refused." >&2
fi
if [ -n "$interrupted" ]; then
    if [ -n "$restart" ]; then
        echo "run_experiments.sh: how $interrupted goes on is said above;" \
            "not moved aside yet:${later:- none}." >&2
    fi
    exit 130
fi
[ -z "$refused" ] || exit 1
[ -z "$failed" ] || exit 3
