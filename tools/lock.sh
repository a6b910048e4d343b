#!/usr/bin/env bash
# Write requirements.lock from pyproject.toml: every dependency, with hashes, for every platform.
# `make lock` keeps the pins that are there; `tools/lock.sh --upgrade` takes the newest versions.
# torch is left out: its build (CPU, CUDA) is the machine's choice, and the Makefile installs it.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet uv==0.13.9

# uv keeps the pins that it finds in the file it writes.
cp requirements.lock "$scratch/" 2>/dev/null || true
"$scratch/venv/bin/uv" pip compile pyproject.toml \
    --extra tracking --group dev --group files \
    --universal --python-version 3.11 --fork-strategy fewest \
    --generate-hashes --no-emit-package torch --no-emit-index-url --no-emit-find-links \
    --custom-compile-command "make lock" --quiet \
    --output-file "$scratch/requirements.lock" "$@" > "$scratch/stdout"

if grep -E '^(torch|triton|nvidia|cuda)[-=]' "$scratch/requirements.lock"; then
    echo "requirements.lock must not pin torch or its GPU packages (see above)" >&2
    exit 1
fi
cp "$scratch/requirements.lock" requirements.lock
