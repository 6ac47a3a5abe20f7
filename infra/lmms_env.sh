#!/usr/bin/env bash
# Makes the environment that lmms-eval runs in with our plugin: .venv-lmms, on top of .venv (./setup.sh), whose torch, transformers and
# PyAV it shares. Quick when it is done. `.venv-lmms/bin/pip install NAME` adds what a task of lmms-eval needs beyond that.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$root/.venv-lmms
shared=$root/.venv
release=lmms-eval==0.7.3

fail() {
    echo "error: $1
  where: $folder
  fix:   $2" >&2
    exit 2
}

[ -x "$shared/bin/python" ] || fail "there is no .venv to build on" "run ./setup.sh first"

# Complete when its stamp names this script, these locks and this checkout; the stamp is written last.
stamp=$folder/.fvlm-stamp
wanted=$( (cat "$root/requirements-lmms.lock" "$root/requirements.lock" "$root/infra/lmms_env.sh" "$root/pyproject.toml" && echo "$root") | sha256sum)
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0

echo "setting up lmms-eval's environment (about half a minute, 0.3 GB)"
rm -rf "$folder" && "$shared/bin/python" -m venv "$folder" ||
    fail "the environment cannot be made" "install the venv module (Debian: apt-get install python3-venv)"
# addsitedir also reads .venv's own .pth files, which is how it knows this checkout
site() { "$1" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'; }
printf 'import site; site.addsitedir("%s")\n' "$(site "$shared/bin/python")" >"$(site "$folder/bin/python")/fvlm.pth"
# --no-deps: lmms-eval asks for an older PyAV, a certain wandb, and a torchvision that does not fit a CPU build of torch; it runs without
"$folder/bin/python" -m pip --quiet --disable-pip-version-check install --no-deps -r "$root/requirements-lmms.lock" "$release" ||
    fail "lmms-eval's packages cannot be installed" "see pip's message above; is a package index reachable?"
"$folder/bin/python" -c 'from lmms_eval.models import get_model_manifest; get_model_manifest("fvlm")' ||
    fail "lmms-eval does not start, or does not know the plugin" "run ./setup.sh and $0 again"
echo "$wanted" >"$stamp"
