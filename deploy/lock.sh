#!/usr/bin/env bash
# Renew the locks below requirements/, from the bounds in pyproject.toml. Usage: lock.sh [--upgrade], through `make lock`.
#
# current.lock   the newest versions that fit: what `make` installs, with the tools of development
# oldest.lock    the lower bounds of pyproject.toml, with the same tools
# base, embed, all.lock   the current stack without the tools: what is deployed
# jars-4.0, jars-4.2.lock the jars beside those of Spark, from conf/spark-*.conf, of each stack that is set up
set -euo pipefail
cd "$(dirname "$0")/.."

# The locks name this path in their comments.
scratch=build/lock
mkdir -p "$scratch"

compile() {
  uv pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-header pyproject.toml "$@"
}

hashed=(--generate-hashes)
compile --extra dev "${hashed[@]}" --output-file requirements/current.lock "$@"
# A lock with hashes cannot be a constraint of one without: these are its names and versions.
grep -oE '^[a-z0-9._-]+==[^ ]+' requirements/current.lock >"$scratch/current"
compile --constraint "$scratch/current" "${hashed[@]}" --output-file requirements/base.lock
for extra in embed all; do
  compile --extra "$extra" --constraint "$scratch/current" "${hashed[@]}" --output-file "requirements/$extra.lock"
done

# pyarrow 14 was built for numpy 1, but says so nowhere.
echo 'numpy<2' >"$scratch/numpy"
compile --extra all --resolution lowest-direct --constraint "$scratch/numpy" --output-file "$scratch/oldest"
compile --extra dev --constraint "$scratch/oldest" "${hashed[@]}" --output-file requirements/oldest.lock

# The installer itself, for environments that have only pip.
grep -E '^uv==' "$scratch/current" | uv pip compile --quiet --no-header --no-annotate --generate-hashes --output-file requirements/uv.lock -

for environment in .venv .venv-oldest; do
  [ ! -x "$environment/bin/python" ] || "$environment/bin/python" deploy/fetch_jars.py --lock
done
