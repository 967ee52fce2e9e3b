# shellcheck shell=sh
# Sourced by the other scripts, with here=their folder: sets PYTHON to a Python that has all of requirements.txt, and of
# requirements-dev.txt where REQUIREMENTS names it too. That is the active virtual or conda environment if it has the
# pinned versions; otherwise .venv beside the scripts (or VENV_DIR), made here and updated when the requirements change.
# constraints.txt pins what these packages need in turn.

: "${REQUIREMENTS:=requirements.txt}"
: "${VENV_DIR:=$here/.venv}"
SUPPORTED='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))'

has_pins() {
    for file in $REQUIREMENTS; do
        "$1" - "$here/$file" 2>/dev/null <<'PYTHON' || return 1
import re, sys
from importlib.metadata import version
pins = re.findall(r"^([\w-]+)(?:\[.*?\])?==(\S+)", open(sys.argv[1]).read(), re.MULTILINE)
sys.exit(any(version(name).split("+")[0] != pin for name, pin in pins))
PYTHON
    done
}

is_installed() {
    for file in constraints.txt $REQUIREMENTS; do
        cmp -s "$here/$file" "$VENV_DIR/installed-$file" || return 1
    done
}

make_venv() {
    if ! "$VENV_DIR/bin/python" -c "import pip; $SUPPORTED" 2>/dev/null; then # or cut off before it had pip
        found=
        for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
            if "$candidate" -c "$SUPPORTED" 2>/dev/null; then
                found=$candidate
                break
            fi
        done
        if [ -n "$found" ]; then
            "$found" -m venv --clear "$VENV_DIR"
        elif command -v uv >/dev/null; then # it brings a Python of its own
            uv venv --quiet --clear --seed --python 3.13 "$VENV_DIR"
        else
            echo "This needs Python 3.11, 3.12, 3.13 or 3.14, and here is $(python3 --version 2>&1 || :):" \
                "install one of them, or uv, and run the command again." >&2
            exit 1
        fi
    fi
    if ! is_installed; then
        echo "Installing the packages of $REQUIREMENTS into $VENV_DIR (6 GB, some minutes) ..."
        arguments="-c constraints.txt"
        for file in $REQUIREMENTS; do arguments="$arguments -r $file"; done
        # The file names hold no spaces, the folder may: so pip runs there, and the list is split on purpose.
        # shellcheck disable=SC2086
        if ! (cd "$here" && "$VENV_DIR/bin/python" -m pip install --quiet --disable-pip-version-check $arguments); then
            echo "The packages could not be installed (see above): mend that and run the command again." >&2
            exit 1
        fi
        for file in constraints.txt $REQUIREMENTS; do cp "$here/$file" "$VENV_DIR/installed-$file"; done
    fi
}

if [ -n "${DMEL_PYTHON:-}" ]; then # the calling script has looked already
    PYTHON=$DMEL_PYTHON
else
    active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    if [ -n "$active" ] && has_pins "$active/bin/python"; then
        PYTHON=$active/bin/python
    else
        make_venv
        PYTHON=$VENV_DIR/bin/python
    fi
    echo "Using $PYTHON ($("$PYTHON" --version))"
fi
DMEL_PYTHON=$PYTHON
export DMEL_PYTHON
