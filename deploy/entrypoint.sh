#!/usr/bin/env bash
# What Spark on Kubernetes starts in a container: `driver …` or `executor`, with the rest in SPARK_… variables that
# Spark sets; anything else is run as it stands, such as `cbmir doctor`.
set -euo pipefail

case "${1:-}" in
  driver)
    shift
    # Cluster mode has already happened: this container is where the driver runs.
    exec "$SPARK_HOME/bin/spark-submit" \
      --conf "spark.driver.bindAddress=$SPARK_DRIVER_BIND_ADDRESS" \
      --deploy-mode client \
      "$@"
    ;;
  executor)
    shift
    # Spark hands JVM options over as SPARK_JAVA_OPT_0, SPARK_JAVA_OPT_1, …; one option each, spaces and all.
    options=()
    for name in "${!SPARK_JAVA_OPT_@}"; do
      options+=("${!name}")
    done
    java="${JAVA_HOME:+$JAVA_HOME/bin/}java"
    exec "$java" \
      ${options[@]+"${options[@]}"} \
      "-Xms$SPARK_EXECUTOR_MEMORY" \
      "-Xmx$SPARK_EXECUTOR_MEMORY" \
      -cp "${SPARK_CONF_DIR:+$SPARK_CONF_DIR:}$SPARK_HOME/jars/*" \
      org.apache.spark.scheduler.cluster.k8s.KubernetesExecutorBackend \
      --driver-url "$SPARK_DRIVER_URL" \
      --executor-id "$SPARK_EXECUTOR_ID" \
      --cores "$SPARK_EXECUTOR_CORES" \
      --app-id "$SPARK_APPLICATION_ID" \
      --hostname "$SPARK_EXECUTOR_POD_IP" \
      --resourceProfileId "$SPARK_RESOURCE_PROFILE_ID" \
      --podName "$SPARK_EXECUTOR_POD_NAME"
    ;;
  "")
    echo "entrypoint.sh: give driver, executor, or a command such as cbmir doctor" >&2
    exit 2
    ;;
  *)
    exec "$@"
    ;;
esac
