#!/usr/bin/env bash
# Set up a fresh machine: .venv from requirements.lock, and a separate environment for video2dataset. Quick if already done.
# Needs Python 3.11 or newer with venv; FVLM_PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")"

python=${FVLM_PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python 3.11 or newer is needed, but '$python' is older or missing
  fix: install it (Debian: apt-get install python3 python3-venv), or name one: FVLM_PYTHON=python3.12 $0" >&2
    exit 2
fi

./infra/video2dataset_env.sh & # in parallel
other=$!

# The environment is complete if its stamp equals the checksum of these files; the stamp is written last.
stamp=.venv/.fvlm-lock
wanted=$(cat requirements.lock requirements-data.lock pyproject.toml | sha256sum)
if [ "$(cat $stamp 2>/dev/null)" != "$wanted" ]; then
    echo "setting up .venv (a few minutes the first time)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv || {
        echo "error: could not make .venv
  fix: install the venv module (Debian: apt-get install python3-venv)" >&2
        exit 2
    }
    ./infra/install.sh .venv -r requirements.lock
    ./infra/install.sh .venv --no-deps -r requirements-data.lock -e .
    # Compile the modules that a run imports, which also checks that they import. All twenty-five thousand files would take twice as long.
    export PYTHONDONTWRITEBYTECODE=
    .venv/bin/python -c 'import infra.server, prefect.cli.worker, deployments.register, flows.pipeline' & # in parallel
    server=$!
    .venv/bin/python -c 'import fvlm_core.train.loop, fvlm_core.eval.evaluate, fvlm_core.release.release
import matplotlib.pyplot, pandas, scipy.optimize, wandb'
    wait $server
    echo "$wanted" >$stamp
fi
wait $other
