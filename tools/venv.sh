# Sourced by examples/quickstart/run.sh and tests/run.sh, with the repository's root as working directory.
#
#   prepare_venv    makes .venv and installs the package with its tests and the development pins, unless that was done
#                   already for the same pyproject.toml and constraints.txt; afterwards .venv/bin/python is ready.
#
# Every failure is one sentence on stderr and a return value of 1.

# Prints an interpreter of the version in .python-version; python3 comes first because pyenv and the like choose it.
find_python() {
  local wanted candidate
  read -r wanted <.python-version
  for candidate in python3 "python$wanted"; do
    if [[ "$("$candidate" --version 2>/dev/null)" == "Python $wanted".* ]]; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python $wanted here, neither as python3 nor as python$wanted: install it and start again." >&2
  return 1
}

# Whatever changes what would be installed changes this line.
describe_installation() {
  echo "$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1) $PWD"
}

prepare_venv() {
  local python stamp=.venv/installed log=.venv/install.log started=$SECONDS
  if [[ -x .venv/bin/python && -f "$stamp" && "$(<"$stamp")" == "$(describe_installation)" ]]; then
    return
  fi
  if [[ ! -x .venv/bin/python ]]; then
    python=$(find_python) || return 1
    echo "[venv] making .venv with $("$python" --version)"
    if ! "$python" -m venv .venv; then
      echo "$python -m venv failed: on Debian and Ubuntu install python3-venv, then start again." >&2
      return 1
    fi
  fi
  echo "[venv] installing the package and the versions of constraints.txt into .venv"
  echo "[venv] a first run takes minutes and 9 GB of disk, of which 6.3 GB stay"
  if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]' \
    >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "pip could not install the package: the lines above are the end of $log." >&2
    return 1
  fi
  describe_installation >"$stamp"
  echo "[venv] installed in $((SECONDS - started)) s"
}
