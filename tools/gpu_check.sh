#!/bin/bash
# gpu_check.sh [OUT]: everything that needs an NVIDIA GPU, in one run that keeps each result as it comes.
#   OUT                 folder of the results; default build/gpu-check
#   PYTHON=python3      a Python with torch and zerotop's packages; or .venv/bin/python, if that is there
#   WHEELS=             a folder of wheels, installed first, with no network
#   BUDGET_S=540        seconds for all of it: a step gets what is left, and none begins with less than 15
#   ONLY=               names of steps, space-separated; default: all
# OUT/summary.txt has a line for each step (name, outcome, seconds), OUT/NAME.log what it printed. A step that fails stops no
# other. Exit code: 0 all passed, 1 some failed or were not reached, 3 no GPU.
# shellcheck disable=SC2329                             # functions that `timeout bash -c` calls
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${1:-build/gpu-check} budget=${BUDGET_S:-540} wheels=${WHEELS:-} only=${ONLY:-}
[ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
summary=$out/summary.txt
: > "$summary"
gpu=0 failed=0
SECONDS=0

note() { printf '%-24s %-12s %5s s\n' "$1" "$2" "$3" | tee -a "$summary"; }

wanted() { [ -z "$only" ] || [[ " $only " == *" $1 "* ]]; }

# step NAME LIMIT COMMAND...: at most LIMIT seconds, fewer where less is left.
step() {
  local name=$1 limit=$2 began=$SECONDS left=$((budget - SECONDS)) code
  shift 2
  wanted "$name" || return 0
  if [ "$left" -lt 15 ]; then note "$name" "not reached" 0; failed=1; return 0; fi
  [ "$limit" -le "$left" ] || limit=$left
  # From the first byte on in the file: what a time-out leaves is kept.
  timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1
  code=$?
  case $code in
    0) note "$name" passed $((SECONDS - began)) ;;
    124 | 137) note "$name" "timed out" $((SECONDS - began)); failed=1 ;;
    *) note "$name" "failed ($code)" $((SECONDS - began)); failed=1 ;;
  esac
}

on_gpu() {
  if [ "$gpu" = 1 ]; then step "$@"; elif wanted "$1"; then note "$1" "no GPU" 0; fi
}

describe() {
  nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max --format=csv
  nvidia-smi topo -m
  nproc; free -g; git log -1 --format=%H 2>/dev/null
  "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda, "NCCL", torch.cuda.nccl.version(),
torch.cuda.get_device_properties(0))'
}

install_wheels() {
  "$python" -m pip install --no-index --no-deps "$wheels"/*.whl
}

build_kernels() {                                       # for this GPU's generation alone
  local arch
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '. ')
  cmake -S . -B build/gpu -DCMAKE_BUILD_TYPE=Release "-DZT_CUDA_ARCHS=$arch-real" &&
    cmake --build build/gpu --parallel && cp build/gpu/libzt_*.so runtime/ &&
    "$python" -c 'from runtime import native
print(native.cpu_status()); print(native.cuda_status()); raise SystemExit(not native.cuda_available())'
}

sanitize() {                                            # a few calls of each kernel: the tools slow them down a hundredfold
  compute-sanitizer --tool "$1" --error-exitcode 9 --target-processes all \
    "$python" -m pytest -q -x -p no:cacheprovider --timeout=0 tests/gpu/test_cuda_adamw.py \
    -k "many_ranges or take_the_memory or non_finite or (same_bits and 4099 and unaligned)"
}

tutorial() {                                            # the run, the screen on it, and a picture of that
  local run=gpu-check-$$ code
  "$python" -m zerotop launch examples/zero2_offload.json --name "$run" --detach --set zerotop.train.steps=60 || return
  "$python" - "$run" "$out" <<'PY'
import os, pty, select, sys, time

run, out = sys.argv[1:]
pid, terminal = pty.fork()
if pid == 0:
    os.environ.update(COLUMNS="140", LINES="40", TERM="xterm-256color", COLORTERM="truecolor", XDG_PICTURES_DIR=out)
    os.execvp(sys.executable, [sys.executable, "-m", "zerotop", "attach", run, "--read-only"])

def read_for(seconds):
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            try:
                if not os.read(terminal, 65536):
                    return
            except OSError:
                return

read_for(25)
os.write(terminal, b"\x13")  # Ctrl+S: save the screen
read_for(4)
os.write(terminal, b"q")
read_for(5)
PY
  "$python" -m zerotop status "$run" --json
  "$python" -m zerotop profile "$run" --steps 2
  "$python" -m zerotop logs "$run" | tail -40
  for _ in $(seq 60); do
    "$python" -m zerotop status "$run" --json | grep -q '"state": "running"' || break
    sleep 2
  done
  "$python" -m zerotop trace "$run" "$out/tutorial-trace.json.gz"
  "$python" -m zerotop status "$run"
  code=$?
  ls "$out"/*.svg && return "$code"
}

# ---- what there is -------------------------------------------------------------------------------------------------------
if nvidia-smi -L > "$out/gpus.txt" 2>&1 && grep -q '^GPU 0' "$out/gpus.txt"; then gpu=1; fi
# timeout runs programs, not functions.
export python wheels out
export -f describe install_wheels build_kernels sanitize tutorial
as_shell() { local name=$1 limit=$2; shift 2; on_gpu "$name" "$limit" bash -c '"$@"' bash "$@"; }

[ -z "$wheels" ] || step wheels 180 bash -c install_wheels
as_shell device 30 describe
as_shell build 240 build_kernels

# ---- (a) tests -------------------------------------------------------------------------------------------------------------
for file in cuda_adamw arena phases streamed engine offload two_ranks activations cross_entropy; do
  beside=()
  if [ "$file" = offload ] && "$python" -c 'import xdist' 2> /dev/null; then beside=(-n 4); fi # 64 processes
  on_gpu "test-$file" 150 "$python" -m pytest -q -rs --timeout=140 "${beside[@]}" "tests/gpu/test_$file.py"
done

# ---- (b) compute-sanitizer ---------------------------------------------------------------------------------------------------
if [ "$gpu" = 1 ] && ! command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do wanted "$tool" && note "$tool" "no sanitizer" 0; done
else
  as_shell memcheck 90 sanitize memcheck
  as_shell racecheck 90 sanitize racecheck
fi

# ---- (c) benchmarks, (e) one trace of the overlap ------------------------------------------------------------------------------
on_gpu adam 60 "$python" -m benchmarks.gpu_adam --markdown "$out/gpu-adam.md"
on_gpu offload 240 "$python" -m benchmarks.offload --device cuda --preset gpt-1.3b --rounds 1 --steps 4 --warm 3 \
  --markdown "$out/gpu-offload.md" --svg "$out/gpu-offload.svg" --perfetto "$out/gpu-offload-trace.json" \
  resident offload no-overlap by-cpu by-gpu torchao deepspeed fsdp2
on_gpu offload-7b 180 "$python" -m benchmarks.offload --device cuda --preset gpt-7b --rounds 1 --steps 2 --warm 3 \
  --markdown "$out/gpu-offload-7b.md" offload

# ---- (d) the tutorial ------------------------------------------------------------------------------------------------------------
as_shell tutorial 180 tutorial

[ "$gpu" = 1 ] || exit 3
exit "$failed"
