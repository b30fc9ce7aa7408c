"""`spark-submit jobs/ingest.py …`: the flags of `cbmir ingest`."""

from cbmir_spark.cli.app import main

if __name__ == "__main__":
    main("ingest")
