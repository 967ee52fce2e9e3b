#!/bin/sh
# Fetches AudioMNIST and ESC-50 into data/ (or DATA_DIR), each whole or not at all, and prepares them for training:
#
#     sh download_data.sh [audio_mnist] [esc50]
#
# AUDIO_MNIST_URL and ESC50_URL name another git repository, or a local folder to copy; links in it are followed, and
# nothing is written to it.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
: "${DATA_DIR:=$here/data}"
: "${AUDIO_MNIST_URL:=https://github.com/soerenab/AudioMNIST}"
: "${ESC50_URL:=https://github.com/karolpiczak/ESC-50}"
case "$DATA_DIR" in -*) DATA_DIR=./$DATA_DIR ;; esac
GIT_TERMINAL_PROMPT=0                      # an unknown repository is an error, not a question for a password
GIT_ALLOW_PROTOCOL=file:git:http:https:ssh # and not ext, which runs a command
export GIT_TERMINAL_PROMPT GIT_ALLOW_PROTOCOL

refuse() {
    echo "download_data.sh: $*." >&2
    exit 1
}

fail() {
    refuse "$1: set AUDIO_MNIST_URL and ESC50_URL to git URLs or local folders that can be read," \
        "or run \`sh doit.sh quick\`, which needs no download"
}

url_of() {
    case "$1" in audio_mnist) echo "$AUDIO_MNIST_URL" ;; esc50) echo "$ESC50_URL" ;; esac
}

place_of() {
    case "$1" in audio_mnist) echo data ;; esc50) echo meta/esc50.csv ;; esac
}

is_folder() { # and not a bare git repository
    [ -d "$1" ] && ! { [ -f "$1/HEAD" ] && [ -d "$1/objects" ]; }
}

is_ready() { # a folder, a dataset: whether it, or a folder in it, holds recordings or a cache of them
    case "$2" in
    audio_mnist) set -- "$1/$2"_*.npy "$1"/*/"$2"_*.npy "$1"/data/*/*.wav "$1"/*/data/*/*.wav ;;
    esc50) set -- "$1/$2"_*.npy "$1"/*/"$2"_*.npy "$1"/audio/* "$1"/*/audio/* ;;
    esac
    for file; do
        [ -e "$file" ] && return
    done
    return 1
}

source_of() { # the URL of a dataset; of a local folder around one, as unzipping makes it, the one inside
    url=$(url_of "$1")
    if is_folder "$url" && [ ! -e "$url/$(place_of "$1")" ]; then
        for inner in "$url"/*/; do
            [ ! -e "$inner$(place_of "$1")" ] || url=${inner%/}
        done
    fi
    printf '%s\n' "$url"
}

variable_of() {
    case "$1" in audio_mnist) echo AUDIO_MNIST_URL ;; esc50) echo ESC50_URL ;; esac
}

is_there() {
    [ -e "$1" ] || [ -L "$1" ]
}

temporary=
clean_up() {
    if [ -n "$temporary" ]; then
        chmod -R u+w "$temporary" 2>/dev/null || :
        rm -rf "$temporary"
        temporary=
    fi
}
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

[ $# -gt 0 ] || set -- audio_mnist esc50
missing=
for name in "$@"; do
    url=$(source_of "$name")
    target=$DATA_DIR/$name
    [ -n "$url" ] || refuse "unknown dataset '$name': there are audio_mnist and esc50"
    rmdir "$target" 2>/dev/null || : # an empty folder is none
    if is_ready "$target" "$name"; then
        echo "$name: in $target already"
        continue
    fi
    is_there "$target" && refuse "$target is in the way, it is not a folder with recordings:" \
        "move what holds $(place_of "$name") there, so that there is $target/$(place_of "$name")," \
        "or remove it or set DATA_DIR"
    missing="$missing $name"
    case "$url" in
    -*) fail "$name cannot be fetched from '$url', which begins with -" ;;
    *.zip) refuse "$url is a zip archive: unzip it and name the folder that it gives," \
        "$(variable_of "$name")=FOLDER sh download_data.sh $name" ;;
    esac
    if is_folder "$url"; then
        [ -e "$url/$(place_of "$name")" ] || fail "$url is not a copy of $name, it has no $(place_of "$name")"
        continue
    fi
    command -v git >/dev/null || fail "git is not installed, so $name could not be fetched from $url"
    reason=$(git ls-remote -- "$url" HEAD 2>&1 >/dev/null) ||
        fail "$name could not be fetched from $url ($(printf '%s\n' "$reason" | sed -n '/^fatal/{p;q;}'))"
done

. "$here/python_env.sh"
reason=$(mkdir -p -- "$DATA_DIR" 2>&1) || refuse "cannot make the folder $DATA_DIR ($reason): set DATA_DIR"
for name in $missing; do
    url=$(source_of "$name")
    target=$DATA_DIR/$name
    is_there "$target" && continue # named twice
    for left in "$DATA_DIR/.$name".??????; do
        ! is_there "$left" || echo "$left was left by a download that was killed, if none runs now: remove it" >&2
    done
    reason=$(mktemp -d "$DATA_DIR/.$name.XXXXXX" 2>&1) || refuse "cannot write to $DATA_DIR ($reason): set DATA_DIR"
    temporary=$reason
    copy=$temporary/$name
    if is_folder "$url"; then
        echo "$name: copying $url"
        reason=$(cp -RL -- "$url" "$copy" 2>&1) ||
            fail "$name could not be copied from $url ($(printf '%s\n' "$reason" | tail -n 1))"
        chmod -R u+w "$copy"
        rm -rf "$copy/.git"
    else
        git clone --depth 1 -- "$url" "$copy" ||
            refuse "$name could not be fetched from $url, and nothing of it is left: the same command tries again;" \
                "or fetch and unzip it by other means, such as a browser, and name the folder," \
                "$(variable_of "$name")=FOLDER sh download_data.sh $name"
    fi
    [ -e "$copy/$(place_of "$name")" ] || fail "$url is not a copy of $name, it has no $(place_of "$name")"
    # Python's rename replaces nothing and moves into nothing: where two downloads run, the first one wins.
    if ! "$PYTHON" -c 'import os, sys; os.rename(*sys.argv[1:])' "$copy" "$target" 2>/dev/null; then
        is_ready "$target" "$name" || refuse "cannot move $name to $target: remove what is there or set DATA_DIR"
        echo "$name: another download was quicker"
    fi
    clean_up
done

"$PYTHON" "$here/datasets.py" "$DATA_DIR"
