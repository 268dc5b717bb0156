#!/usr/bin/env bash
# Prints the folder of a release of transformers with what it requires, to be put in front of an environment's own
# packages (PYTHONPATH); installs it there, in .compat/<release>, when it is not there yet.
#
#   tools/overlay.sh 5.4.0
#   tools/overlay.sh newest      asks each time
#
# PYTHON names the interpreter (default: .venv/bin/python).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
requirement="transformers==$1"
overlay="$PWD/.compat/$1"
if [ "$1" = newest ]; then
    requirement="transformers"
    rm -rf "$overlay" # the newest of the last run may not be the newest of today
fi
if [ ! -d "$overlay" ]; then
    echo "installing $requirement ..." >&2
    rm -rf "$overlay.part"
    "$python" -m pip install --quiet --disable-pip-version-check --target "$overlay.part" "$requirement" >&2
    mv "$overlay.part" "$overlay"
fi
echo "$overlay"
