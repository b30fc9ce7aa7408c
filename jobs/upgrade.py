"""`spark-submit jobs/upgrade.py …`: the flags of `cbmir upgrade`."""

from cbmir_spark.cli.app import main

if __name__ == "__main__":
    main("upgrade")
