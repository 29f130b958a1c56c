#!/usr/bin/env bash
# Run the fast tests under several versions of torch, each in an environment and a clone of its own:
#
#   tests/versions.sh 2.14.1 2.15.0
#
# A torch of PyPI for Linux brings CUDA's libraries, 5.5 GB a version. Other requirements may be given as
# REQUIREMENTS='torchao==0.17.0 transformers==5.0.0'. What is committed is tested. KEEP=FOLDER keeps the
# environments there, to use them again. The last lines say what each version gave.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,9p' "$0"; exit 2; }
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
results=()
for version in "$@"; do
  environment=${KEEP:-$folder}/torch-$version
  checkout=$folder/checkout-$version
  git clone -q . "$checkout"
  [ -d "$environment" ] || python3 -m venv "$environment"
  "$environment/bin/pip" install -q "torch==$version" ${REQUIREMENTS:-}
  (cd "$checkout" && "$environment/bin/pip" install -q -e '.[test,demo]')
  log=$folder/$version.log
  (cd "$checkout" && "$environment/bin/python" -m pytest -q) 2>&1 | tee "$log" || true
  results+=("torch $version: $(grep -E '^(=+ )?[0-9]+ (passed|failed|error)' "$log" | tail -n 1 || tail -n 1 "$log")")
done
printf '%s\n' "${results[@]}"
printf '%s\n' "${results[@]}" | grep -qE 'failed|error' && exit 1
exit 0
