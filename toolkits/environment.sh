# Sourced by tests/run.sh and examples/quickstart.sh: makes a virtual environment with the project.

say() { printf '\n== %s\n' "$*"; }

give_up() {
  printf '\n%s\n' "$*" >&2
  exit 1
}

# make_environment DIR WHAT: pip-installs WHAT, as in ".[test]", into DIR; does nothing when DIR
# already holds this setup.py's packages, and this checkout.
make_environment() {
  local dir=$1 what=$2 python=${PYTHON:-python3} stamp
  stamp="$dir/.installed-$(printf '%s' "$what$PWD$(cat setup.py)" | sha256sum | cut -c1-16)"
  if [ -e "$stamp" ]; then
    say "using the environment $dir"
    return
  fi
  "$python" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 10))' 2>/dev/null ||
    give_up "Python 3.10 or newer is needed; set PYTHON=/path/to/python3.11 and run this again."
  say "making the environment $dir with $("$python" --version) (about 3 minutes)"
  "$python" -m venv "$dir" || give_up "python -m venv failed; on Debian: apt-get install python3-venv."
  # torch first and by itself: on a machine without a GPU its CPU build is enough.
  install "$dir" "${TORCH:-torch==2.13.0}" || give_up \
    "torch could not be installed; set TORCH to a version your package index has, as in TORCH=torch==2.8.0."
  install "$dir" -e "$what" || give_up \
    "the packages of setup.py could not be installed; see the lines above, then run this again."
  touch "$stamp"
}

install() {
  local dir=$1
  shift
  say "pip install $*"
  "$dir/bin/python" -m pip install --quiet --disable-pip-version-check "$@" 2>&1 |
    { grep -v '^WARNING: Location' || true; }
}
