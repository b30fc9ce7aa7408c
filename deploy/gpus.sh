#!/usr/bin/env bash
# Spark's resource discovery: the GPUs of this machine, as one line of JSON
# (spark.executor.resource.gpu.discoveryScript, spark.driver.resource.gpu.discoveryScript).
set -euo pipefail

if ! command -v nvidia-smi >/dev/null; then
  echo "gpus.sh: there is no nvidia-smi on $(hostname): install NVIDIA's driver, or ask for no GPU there" >&2
  exit 1
fi
addresses="$(nvidia-smi --query-gpu=index --format=csv,noheader | tr -d ' \r' | sed 's/.*/"&"/' | paste -sd, -)"
if [[ -z "$addresses" ]]; then
  echo "gpus.sh: nvidia-smi finds no GPU on $(hostname)" >&2
  exit 1
fi
echo "{\"name\": \"gpu\", \"addresses\": [$addresses]}"
