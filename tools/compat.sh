#!/usr/bin/env bash
# Runs the equality tests under several releases of transformers, all with the torch of one environment.
#
#   tools/compat.sh                     5.4.0, 5.15.0 and the newest
#   tools/compat.sh 5.8.1 newest        those that are named
#
# Where a release lies, tools/overlay.sh says.
# PYTHON names the interpreter (default: .venv/bin/python).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
releases=("$@")
if [ ${#releases[@]} -eq 0 ]; then
    releases=(5.4.0 5.15.0 newest)
fi

failed=0
summary=()
mkdir -p .compat
for release in "${releases[@]}"; do
    overlay=$(PYTHON="$python" tools/overlay.sh "$release")
    version=$(PYTHONPATH="$overlay" "$python" -c 'import transformers; print(transformers.__version__)')
    log=".compat/$release.log"
    echo "transformers $version: running the equality tests (log: $log) ..."
    status=passed
    # Old releases warn about the torch of today; their tokens are what counts here.
    PYTHONPATH="$overlay" "$python" -m pytest tests/test_generate.py tests/test_architectures.py \
        -p no:cacheprovider -W default >"$log" 2>&1 || status=FAILED
    if [ "$status" = FAILED ]; then
        failed=1
        grep -E '^(FAILED|ERROR|E  )' "$log" | head -20 || true
    fi
    summary+=("transformers $version: $status ($(tail -n 1 "$log" | tr -d '='))")
done
printf '%s\n' "${summary[@]}"
exit "$failed"
