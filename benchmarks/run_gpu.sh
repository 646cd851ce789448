#!/usr/bin/env bash
# Proof on a machine with an NVIDIA GPU: builds in place, tests, sanitizes, measures. Fetches nothing, installs nothing.
usage() {
  cat <<'EOF'
usage: benchmarks/run_gpu.sh [--seconds N] [--phases "build tests sanitize bench"] [DIR]

Runs the phases one after the other and leaves in DIR (build/gpu) at most six files: a log per phase, bench.json and
summary.md. The time (540 s) covers all of them; what the benchmarks leave out for want of it, the summary names.

Uses the Python that is active, or the one that PYTHON names; it must have torch with CUDA, triton, transformers,
pytest, setuptools, pybind11, cmake and ninja; nvcc must be at hand. pytest-xdist is used where it is installed.

Exit code: 0 if every phase passed, 1 if one failed (the others run all the same), 2 if nothing can run here.
To keep the results: python -m benchmarks.report DIR/bench.json
EOF
}

set -uo pipefail

seconds=540
phases="build tests sanitize bench"
folder=""
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --seconds | --phases)
      if (($# < 2)); then
        echo "run_gpu.sh: $1 needs a value" >&2
        exit 2
      fi
      if [[ $1 == --seconds ]]; then seconds=$2; else phases=$2; fi
      shift 2
      ;;
    -*)
      echo "run_gpu.sh: unknown option $1 (--help lists them)" >&2
      exit 2
      ;;
    *)
      if [[ -n $folder ]]; then
        echo "run_gpu.sh: one folder, got $folder and $1" >&2
        exit 2
      fi
      folder=$1
      shift
      ;;
  esac
done
if ! [[ $seconds =~ ^[1-9][0-9]*$ ]]; then
  echo "run_gpu.sh: --seconds is '$seconds', expected a whole number" >&2
  exit 2
fi
for phase in $phases; do
  if [[ ! $phase =~ ^(build|tests|sanitize|bench)$ ]]; then
    echo "run_gpu.sh: no phase '$phase', expected build, tests, sanitize or bench" >&2
    exit 2
  fi
done

folder=$(realpath -m -- "${folder:-build/gpu}")
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root" || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$root:$root/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if ! command -v -- "$python" >/dev/null; then
  echo "run_gpu.sh cannot run: no Python called $python" >&2
  exit 2
fi
sanitizer=$("$python" -m benchmarks.harness.gpu.preflight) || exit 2

mkdir -p -- "$folder" || exit 2
rm -f -- "$folder"/{build,tests,sanitize,bench}.log "$folder"/{bench.json,summary.md}
SECONDS=0
outcomes=()
failed=0

left() { echo $((seconds > SECONDS ? seconds - SECONDS : 0)); }

# phase NAME LIMIT COMMAND...: runs the command for at most LIMIT seconds, and no longer than what is left of all.
phase() {
  local name=$1 limit=$2 begun=$SECONDS status
  shift 2
  if (($(left) < limit)); then limit=$(left); fi
  if ((limit == 0)); then
    outcome "$name" "not run: the time is spent"
    failed=1
    return
  fi
  timeout --kill-after=10 "$limit" "$@" >"$folder/$name.log" 2>&1
  status=$?
  local taken=$((SECONDS - begun)) last
  last=$(grep -v '^[[:space:]]*$' "$folder/$name.log" | tail -n 1 | cut -c 1-160)
  case $status in
    0) outcome "$name" "passed in $taken s: $last" ;;
    124 | 137)
      outcome "$name" "stopped after $taken s, which is its limit: $last"
      failed=1
      ;;
    *)
      outcome "$name" "FAILED (exit $status) after $taken s, see $name.log: $last"
      failed=1
      ;;
  esac
}

outcome() {
  outcomes+=("$1: $2")
  echo "$1: $2"
}

build() {
  "$python" setup.py build_ext --inplace && "$python" -m recmas_kernels.info
}

tests() {
  local files workers=()
  mapfile -t files < <(grep -rlE --include='test_*.py' 'mark\.gpu' tests | sort)
  if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))"); fi
  # Only the files that have such tests: the others import packages that a machine for measuring may lack.
  "$python" -m pytest -m gpu -q -p no:cacheprovider --continue-on-collection-errors "${workers[@]}" "${files[@]}"
}

sanitize() {
  local status=0 tool
  # Once without: Triton compiles here, and what fails here is no matter for a sanitizer.
  "$python" -m benchmarks.harness.gpu.small_shapes || return
  for tool in memcheck racecheck; do
    echo "--- $tool"
    # Without torch's own allocator each tensor is an allocation, and a read past its end is one past an allocation's.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --target-processes application-only \
      --error-exitcode 9 --print-limit 20 "$python" -m benchmarks.harness.gpu.small_shapes || status=$?
  done
  return "$status"
}

# $1: seconds after which no further cell begins. Every cell that ended is in the file, however this ends.
bench() {
  "$python" -m pytest benchmarks/suites/gpu -q -p no:cacheprovider -p no:benchmark --grid full \
    --seconds "$1" --records "$folder/bench.json"
}

export -f build tests sanitize bench # for the shells that `timeout` can stop
export python sanitizer folder
for name in $phases; do
  case $name in
    build) phase build 150 bash -c build ;;
    tests) phase tests 200 bash -c tests ;;
    sanitize)
      if [[ -n $sanitizer ]]; then
        phase sanitize 90 bash -c sanitize
      else
        outcome sanitize "skipped: no compute-sanitizer in CUDA_HOME, PATH or /usr/local/cuda"
      fi
      ;;
    bench)
      budget=$(($(left) - 25)) # for starting, and for the cell that is under way
      phase bench "$seconds" bash -c 'bench "$1"' bench "$((budget > 0 ? budget : 0))"
      ;;
  esac
done

{
  printf '%s\n' "# What ran" ""
  printf -- '- %s\n' "${outcomes[@]}"
  echo
  if [[ -f $folder/bench.json ]]; then "$python" -m benchmarks.report.gpu_tables "$folder/bench.json"; fi
} >"$folder/summary.md"
cat -- "$folder/summary.md"
exit "$failed"
