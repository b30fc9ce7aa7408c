"""`spark-submit jobs/retrieve.py …`: the flags of `cbmir retrieve`."""

from cbmir_spark.cli.app import main

if __name__ == "__main__":
    main("retrieve")
