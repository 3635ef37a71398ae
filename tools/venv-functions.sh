# Sourced by the scripts beside it. Environment: PYTHON (the interpreter; default: the first of python3, python3.13 ... that
# is new enough), TORCH_CPU_INDEX (where CPU builds of torch come from; empty: never look there).

# find_python MINOR: print an interpreter of Python 3.MINOR or newer.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c "import sys; sys.exit(sys.version_info < (3, $1))" >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.$1 or newer found${PYTHON:+ (PYTHON=$PYTHON)}. Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2
    return 1
}

# make_venv DIR MINOR: make DIR afresh, a virtual environment of Python 3.MINOR or newer.
make_venv() {
    local python
    python=$(find_python "$2")
    rm -rf "$1"
    if ! "$python" -m venv "$1"; then
        rm -rf "$1"
        echo "$python cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)." >&2
        return 1
    fi
}

answers() { "$1/bin/python" -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)' "$2" 2>/dev/null; }

# install_cpu_torch DIR ARGUMENTS: PyPI's torch for Linux brings CUDA, several GB. Where there is no NVIDIA driver, take the
# CPU build if its index answers; else leave torch to what is installed next.
install_cpu_torch() {
    local dir=$1 index=${TORCH_CPU_INDEX-https://download.pytorch.org/whl/cpu}
    shift
    if [[ $(uname -s) == Linux && -n $index ]] && ! command -v nvidia-smi >/dev/null && answers "$dir" "$index/torch/"; then
        "$dir/bin/python" -m pip --disable-pip-version-check install --quiet --extra-index-url "$index" "$@"
    fi
}
