#!/usr/bin/env bash
# Debian packages that the tests need: chromium (browser tests) and Java 17 or newer (Spark). Installs them if this user may, otherwise
# prints the command to do so.
set -euo pipefail
missing=()
command -v chromium >/dev/null || missing+=(chromium)
command -v java >/dev/null || missing+=(default-jre-headless)
[ ${#missing[@]} = 0 ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing ${missing[*]} for the tests"
    wait=(-o DPkg::Lock::Timeout=300) # another installation may be running, as on a machine that has just started
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${wait[@]}" "${missing[@]}" >/dev/null && exit 0
fi
echo "error: the tests need ${missing[*]}
  fix: sudo apt-get install ${missing[*]}" >&2
exit 2
