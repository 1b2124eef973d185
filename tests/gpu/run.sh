#!/usr/bin/env bash
# Everything that only a GPU can prove or measure, in order of value: bash tests/gpu/run.sh [--minutes 9] [--wheels FOLDER]
# [--output FOLDER] [--rehearse]
# For a bare machine with one H100 or H200, torch and triton, and no network; tests/gpu/README.md says which wheels it needs.
# Every step is bounded in time, its result is on disk at once, and its failure does not end the rest. --rehearse runs every
# step on a CPU with tiny shapes.
set -euo pipefail
began=$SECONDS
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${VWN_PYTHON:-python3}"
wheels="" arguments=()
while (($#)); do
  case "$1" in
    --wheels)
      if [[ ! -d "${2:-}" ]] || ! compgen -G "$2/*.whl" >/dev/null; then
        echo "--wheels ${2:-} is no folder with wheels: tests/gpu/README.md says how to make one." >&2
        exit 2
      fi
      wheels="$2"
      shift 2
      ;;
    *)
      arguments+=("$1")
      shift
      ;;
  esac
done
if [[ -n "$wheels" ]]; then
  site=$(mktemp -d)
  for wheel in "$wheels"/*.whl; do
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$wheel" ||
      echo "$wheel does not install with $python: what needs it is skipped." >&2
  done
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" tests/gpu/hour.py --spent "$((SECONDS - began))" "${arguments[@]}"
