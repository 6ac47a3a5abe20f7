#!/usr/bin/env bash
# install.sh FOLDER ARGUMENTS...: run `pip install ARGUMENTS` in the environment FOLDER with uv, which takes a sixth of pip's CPU time.
# uv does not read pip's configuration, so pip's package indexes are passed on to it. If uv fails, pip is used.
set -euo pipefail
folder=$1 uv_release=uv==0.13.9
shift
pip() { "$folder/bin/python" -m pip --disable-pip-version-check "$@"; }
configured() { # the value of a pip option, from its environment variable or from pip's configuration files
    local variable
    variable=PIP_$(tr a-z- A-Z_ <<<"$1")
    [ -z "${!variable:-}" ] || { echo "${!variable}" && return; }
    pip config list 2>/dev/null | sed -nE "s/^(global|install)\.$1='(.*)'$/\2/p" | tail -n 1 | sed 's/\\n/ /g'
}
by_uv() {
    [ -x "$folder/bin/uv" ] || pip install --quiet "$uv_release" 2>/dev/null || return
    local index extra links certificates
    index=$(configured index-url) extra=$(configured extra-index-url) links=$(configured find-links) certificates=$(configured cert)
    [ -z "$index" ] || export UV_DEFAULT_INDEX=$index
    [ -z "$extra" ] || export UV_INDEX=$extra UV_INDEX_STRATEGY=unsafe-best-match # like pip: take the best version of all indexes
    [ -z "$links" ] || export UV_FIND_LINKS=${links// /,}
    [ -z "$certificates" ] || export SSL_CERT_FILE=$certificates
    "$folder/bin/uv" pip install --quiet --python "$folder/bin/python" "$@"
}
by_uv "$@" || pip install --quiet --no-compile "$@"
