#!/usr/bin/env bash
# Trains a small model with and without a virtual width on Jane Austen's novels and compares them:
#   bash run.sh [--recipe dense|moe-mtp] [--fresh]
# On two CPU cores six to ten minutes after the installation; with a GPU it is used. Start again after
# an interruption.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/venv.sh
prepare_venv
exec .venv/bin/python examples/quickstart/quickstart.py "$@"
