#!/bin/sh
# Runs the test suite: sh run_tests.sh [flags of pytest]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
REQUIREMENTS="requirements.txt requirements-dev.txt"
. "$here/python_env.sh"
cd "$here"
exec "$PYTHON" -m pytest -ra "$@"
