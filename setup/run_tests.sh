#!/bin/sh
# Runs pytest with a process for each CPU, and then each test that failed once more, with nothing beside
# it: setup/run_tests.sh PYTHON [ARGUMENT]...
# Many tests have deadlines, and a shared machine of two CPUs may stand still for longer than the tests
# expect. What fails alone, too, fails the run; what does not is named at the end, because it is a fault
# of the test or of the program all the same.
set -u
python=$1
shift
cache=$PWD/build/tests-$$
trap 'rm -rf "$cache"' EXIT

"$python" -m pytest -o cache_dir="$cache" "$@"
status=$?
[ "$status" = 1 ] || exit "$status"
failed=$cache/v/cache/lastfailed
# So many are no accident.
[ "$(grep -c '": true' "$failed")" -le 5 ] || exit 1
cp "$failed" "$cache/first"
echo
echo "setup: once more, with nothing beside them:"
"$python" -m pytest -o cache_dir="$cache" "$@" --numprocesses 0 --last-failed || exit
echo "setup: these failed beside others and passed alone:"
grep '": true' "$cache/first"
