#!/usr/bin/env bash
# Install a lock, the package of this checkout and Delta's jars into an environment. Usage: install.sh PYTHON FOLDER LOCK
set -euo pipefail
repo="$(cd "$(dirname "$0")/.." && pwd)"
python=$1 folder=$2 lock=$3

"$python" -m venv "$folder"
pip=("$folder/bin/pip" --quiet --disable-pip-version-check)
# uv installs several times faster than pip, but does not read pip's settings.
index=$("${pip[@]}" config get global.index-url 2>/dev/null || true)
index=${PIP_INDEX_URL:-$index}
[ -z "$index" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
if "${pip[@]}" install --require-hashes -r "$repo/requirements/uv.lock" \
  && "$folder/bin/uv" pip install --quiet --python "$folder/bin/python" --require-hashes -r "$lock"; then
  :
else
  printf 'cbmir: uv could not install %s; going on with pip\n' "$lock" >&2
  "${pip[@]}" install --require-hashes -r "$lock"
fi
"${pip[@]}" install --no-deps --no-build-isolation -e "$repo"
"$folder/bin/python" "$repo/deploy/fetch_jars.py"
