"""`spark-submit jobs/train.py …`: the flags of `cbmir train`."""

from cbmir_spark.cli.app import main

if __name__ == "__main__":
    main("train")
