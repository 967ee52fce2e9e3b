#!/bin/sh
# Fetches AudioMNIST and ESC-50 into data/ (or DATA_DIR), each whole or not at all, and prepares them for training:
#
#     sh download_data.sh [audio_mnist] [esc50]
#
# AUDIO_MNIST_URL and ESC50_URL name another git repository, or a local folder to copy.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
: "${DATA_DIR:=$here/data}"
: "${AUDIO_MNIST_URL:=https://github.com/soerenab/AudioMNIST}"
: "${ESC50_URL:=https://github.com/karolpiczak/ESC-50}"
GIT_TERMINAL_PROMPT=0 # an unknown repository is an error, not a question for a password
export GIT_TERMINAL_PROMPT

fail() {
    echo "download_data.sh: $1: set AUDIO_MNIST_URL and ESC50_URL to git URLs or local folders that can be read, or run" \
        "\`sh doit.sh quick\`, which needs no download." >&2
    exit 1
}

url_of() {
    case "$1" in
    audio_mnist) echo "$AUDIO_MNIST_URL" ;;
    esc50) echo "$ESC50_URL" ;;
    *)
        echo "download_data.sh: unknown dataset '$1': there are audio_mnist and esc50." >&2
        exit 1
        ;;
    esac
}

is_folder() { # and not a bare git repository
    [ -d "$1" ] && ! { [ -f "$1/HEAD" ] && [ -d "$1/objects" ]; }
}

[ $# -gt 0 ] || set -- audio_mnist esc50
missing=
for name in "$@"; do
    url=$(url_of "$name")
    rmdir "$DATA_DIR/$name" 2>/dev/null || : # an empty folder is none
    if [ -d "$DATA_DIR/$name" ]; then
        echo "$name: in $DATA_DIR/$name already"
        continue
    fi
    missing="$missing $name"
    is_folder "$url" && continue
    command -v git >/dev/null || fail "git is not installed, so $name could not be fetched from $url"
    reason=$(git ls-remote "$url" HEAD 2>&1 >/dev/null) ||
        fail "$name could not be fetched from $url ($(printf '%s\n' "$reason" | sed -n '/^fatal/{p;q;}'))"
done

. "$here/python_env.sh"
mkdir -p "$DATA_DIR"
for name in $missing; do
    url=$(url_of "$name")
    partial=$DATA_DIR/$name.partial
    trap 'rm -rf "$partial"' EXIT
    rm -rf "$partial"
    if is_folder "$url"; then
        echo "$name: copying $url"
        cp -R "$url" "$partial" || fail "$name could not be copied from $url"
        chmod -R u+w "$partial"
        rm -rf "$partial/.git"
    else
        git clone --depth 1 "$url" "$partial" || fail "$name could not be fetched from $url"
    fi
    case $name in audio_mnist) place=data ;; esc50) place=meta/esc50.csv ;; esac
    [ -e "$partial/$place" ] || fail "$url is not a copy of $name, it has no $place"
    mv "$partial" "$DATA_DIR/$name"
done

"$PYTHON" "$here/datasets.py" "$DATA_DIR"
