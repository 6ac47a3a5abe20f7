#!/usr/bin/env bash
# Debian's chromium for the browser test: installed where this user may, else named with its command.
set -euo pipefail
command -v chromium >/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing chromium for the browser test"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null && exit 0
fi
echo "error: chromium is needed for the browser test
  fix: sudo apt-get install chromium" >&2
exit 2
