#!/usr/bin/env bash
# Submit one job to a standalone cluster; the driver runs here, in client mode (the only one for Python there).
set -euo pipefail

usage() {
  cat >&2 <<'USAGE'
usage: deploy/submit.sh spark://HOST:PORT JOB [flags of the job] [-- options of spark-submit]

  JOB is ingest, remap, upgrade, train, index, retrieve or evaluate; its flags are those of `cbmir JOB`.

  deploy/submit.sh spark://head:7077 ingest --config site.yaml --archive s3a://pacs/2026
  deploy/submit.sh spark://head:7077 retrieve --queries q.csv -- --executor-memory 8g

  PYTHON           the environment's Python here; default: .venv of this checkout, else python3
  PYSPARK_PYTHON   its path on the workers; default: the same path
USAGE
}

fail() {
  echo "submit.sh: $1" >&2
  usage
  exit 2
}

repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

[[ $# -ge 2 ]] || fail "a master and a job are needed"
master="$1"
job="$2"
shift 2
[[ "$master" == spark://*:* ]] || fail "master $master must look like spark://HOST:PORT"
case "$job" in
  ingest | remap | upgrade | train | index | retrieve | evaluate) ;;
  *) fail "there is no job $job" ;;
esac

flags=()
while [[ $# -gt 0 && "$1" != "--" ]]; do
  flags+=("$1")
  shift
done
[[ $# -eq 0 ]] || shift # the rest is spark-submit's

python="${PYTHON:-}"
if [[ -z "$python" ]]; then
  python="$repo/.venv/bin/python"
  [[ -x "$python" ]] || python="$(command -v python3 || true)"
fi
[[ -n "$python" ]] || fail "there is no Python: run make setup, or set PYTHON"
# The driver and the workers have to run one and the same Spark: the installed package's, whatever else is around.
SPARK_HOME="$("$python" -c 'import os, pyspark; print(os.path.dirname(pyspark.__file__))')" \
  || fail "$python has no pyspark: run make setup, or set PYTHON"
export SPARK_HOME
export PYSPARK_DRIVER_PYTHON="$python"
export PYSPARK_PYTHON="${PYSPARK_PYTHON:-$python}"

options=(--master "$master")
# The driver's Spark log goes as it does under `cbmir`: errors only. The jobs report progress themselves.
java="\"-Dlog4j2.configurationFile=file:$repo/conf/log4j2.properties\""
[[ "${CBMIR_DEBUG:-0}" == 0 ]] || java+=" -Dcbmir.traces=error"
options+=(--driver-java-options "$java")
if ! compgen -G "$SPARK_HOME/jars/delta-spark_*.jar" >/dev/null; then
  line="$("$python" -c 'import pyspark; print(".".join(pyspark.__version__.split(".")[:2]))')"
  options+=(--properties-file "$repo/conf/spark-$line.conf")
fi
exec "$SPARK_HOME/bin/spark-submit" "${options[@]}" "$@" "$repo/jobs/$job.py" ${flags[@]+"${flags[@]}"}
