#!/usr/bin/env bash
# Makes the environment that video2dataset runs in (.venv-video2dataset, or the folder given). Quick when it is done.
# --spark adds what it needs on a Spark cluster. FVLM_PYTHON names another Python 3.11 or newer.
set -euo pipefail
spark=
[ "${1:-}" = --spark ] && spark=yes && shift
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/.venv-video2dataset}
python=${FVLM_PYTHON:-python3}
release=video2dataset==1.3.0

fail() {
    echo "error: $1
  where: $folder
  fix:   $2" >&2
    exit 2
}

install() { "$root/infra/install.sh" "$folder" "$@"; }
add_spark() {
    [ -z "$spark" ] || install -r "$root/requirements-video2dataset-spark.txt" ||
        fail "pyspark cannot be installed" "see the message above; is a package index reachable?"
}

# Complete when its stamp names this script, this lock and this checkout; the stamp is written last.
stamp=$folder/.fvlm-stamp
wanted=$( (cat "$root/requirements-video2dataset.lock" "$root/infra/video2dataset_env.sh" && echo "$root") | sha256sum)
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && add_spark && exit 0

echo "setting up video2dataset's environment (about half a minute)"
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder" ||
    fail "the environment cannot be made" "install the venv module (Debian: apt-get install python3-venv)"
install -r "$root/requirements-video2dataset.lock" ||
    fail "video2dataset's packages cannot be installed" "see the message above; is a package index reachable?"
install --no-deps "$release" ||
    fail "$release cannot be installed" "see the message above; is a package index reachable?"

# A .pth file is read at every start of this Python: by video2dataset, by its children, and by Spark's workers.
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
printf '%s\nimport fvlm_core.data.video2dataset_stubs\n' "$root" >"$site/fvlm.pth"
PYTHONDONTWRITEBYTECODE= "$folder/bin/python" -c 'import fvlm_core.data.video2dataset_plugin' || # compiles it, as in setup.sh
    fail "video2dataset does not start" "delete the folder and run $0 again"
echo "$wanted" >"$stamp"
add_spark
