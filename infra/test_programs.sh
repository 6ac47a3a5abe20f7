#!/usr/bin/env bash
# Debian's programs that tests need: chromium (browser tests) and a Java of 17 or newer (Spark). Installed where this user may, else named
# with their command.
set -euo pipefail
missing=()
command -v chromium >/dev/null || missing+=(chromium)
command -v java >/dev/null || missing+=(default-jre-headless)
[ ${#missing[@]} = 0 ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing ${missing[*]} for the tests"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null && exit 0
fi
echo "error: the tests need ${missing[*]}
  fix: sudo apt-get install ${missing[*]}" >&2
exit 2
