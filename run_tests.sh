#!/bin/sh
# Runs the tests that take a few minutes together, or with --slow all of them: sh run_tests.sh [--slow] [flags of pytest]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
REQUIREMENTS="requirements.txt requirements-dev.txt"
. "$here/python_env.sh"
cd "$here"
exec "$PYTHON" -m pytest -ra "$@"
