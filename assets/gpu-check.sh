#!/bin/sh
# What a GPU says of the kernels in a few minutes: whether they are right, how long each takes, and how fast whole models are, dense and compressed.
#
#   gpu-check.sh BINARIES RESULTS
#
# BINARIES holds `lowkey`, `kernel-tests` (the library's unit tests) and `commit` (what they were built from): `make gpu-pack` puts them there. Nothing else is needed but a driver: no compiler,
# no network, no model. RESULTS is made anew. Everything is written as it comes and is whole at every moment, so that a stop loses nothing; summary.md says it all on one page.
#
# TIME=480       seconds in all: a quarter for the tests at the most, half of what is left for the kernels, three quarters of what is then left for whole models, and the rest for
#                weights of few bits and other constants. What is under way when the time is up is finished
# SHAPES=135m,8b DEPTHS=0,8192,32768   what is measured; ROWS=f16,q4,… of the cache, all where it is empty
# CHUNK=128 STEPS=16 ROUNDS=2          tokens that are prefilled and decoded in a measurement, and measurements of each
# TESTS=kernels:: SWEEP=splits,…       which tests are run, and which constants are varied (of `lowkey bench --help`): all where it is empty
set -u

binaries=${1:?which directory has the binaries? see the head of this file}
results=${2:?where are the results to go?}
: "${TIME:=480}" "${SHAPES:=135m,8b}" "${DEPTHS:=0,8192,32768}" "${ROWS:=}" "${CHUNK:=128}" "${STEPS:=16}" "${ROUNDS:=2}" "${TESTS:=kernels:: gpu:: decoder::random}" "${SWEEP:=}"
lowkey=$binaries/lowkey

die() { echo "gpu-check: $*" >&2; exit 1; }
say() { echo "gpu-check: $(($(date +%s) - started)) s: $*" >&2; }
left() {
    seconds=$((started + TIME - $(date +%s)))
    echo $((seconds > 0 ? seconds : 0))
}

[ -x "$lowkey" ] || die "$lowkey is not there; make gpu-pack builds it where there is cargo"
[ ! -e "$results" ] || die "$results is there already; name another directory"
mkdir -p "$results" || exit 1
started=$(date +%s)
failed=0

# The page, from whatever there is so far.
summary() {
    {
        echo "# GPU check of $(date -u +%Y-%m-%d)"
        echo
        echo "Commit $(cat "$binaries/commit" 2>/dev/null || echo unknown)."
        for part in tests speed kernels weights/kernels sweep/kernels; do
            [ -s "$results/$part.md" ] || continue
            printf '\n## %s\n\n' "${part%/*}"
            cat "$results/$part.md"
        done
    } >"$results/.summary" && mv "$results/.summary" "$results/summary.md"
}

# A part that fails does not keep the others from being measured.
part() {
    name=$1
    shift
    say "$name"
    if ! "$@" >"$results/$name.txt" 2>&1; then
        failed=1
        say "$name failed: $(tail -n 1 "$results/$name.txt")"
    fi
    summary
}

tests() {
    if [ ! -x "$binaries/kernel-tests" ]; then
        echo "There is no $binaries/kernel-tests: kernels were not tested." | tee "$results/tests.md"
        return 0
    fi
    # shellcheck disable=SC2086 # several words
    timeout --kill-after 10 $((TIME / 4)) "$binaries/kernel-tests" --test-threads 4 $TESTS
    code=$?
    [ "$code" != 124 ] || echo "stopped after $((TIME / 4)) s"
    grep -E '^test .*FAILED|^test result|^stopped|panicked' "$results/tests.txt" >"$results/tests.md"
    return "$code"
}

bench() {
    "$lowkey" bench --device gpu --shape "$SHAPES" --depth "$DEPTHS" ${ROWS:+--rows "$ROWS"} --prefill "$CHUNK" --report "$results" "$@"
}

# Of the last shape at the second depth: dense rows, and coded ones of which nothing is rebuilt.
sweep() {
    depth=$(echo "$DEPTHS," | cut -d , -f 2)
    "$lowkey" bench --device gpu --kernels --sweep${SWEEP:+="$SWEEP"} --shape "${SHAPES##*,}" --depth "${depth:-$DEPTHS}" --rows f16,fast --prefill "$CHUNK" --report "$results/sweep" "$@"
}

# Of the last shape, weights of few bits: multiplied in f32 and in integers.
weights() {
    "$lowkey" bench --device gpu --kernels --sweep=int8 --weights q4,q8 --shape "${SHAPES##*,}" --depth 0 --rows f16 --prefill "$CHUNK" --report "$results/weights" "$@"
}

part doctor "$lowkey" doctor
part tests tests
part kernels bench --kernels --time $(($(left) / 2))
part speed bench --steps "$STEPS" --rounds "$ROUNDS" --time $(($(left) * 3 / 4))
part weights weights --time $(($(left) / 2))
part sweep sweep --time "$(left)"
say "done: $results/summary.md"
exit "$failed"
