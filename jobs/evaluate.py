"""`spark-submit jobs/evaluate.py …`: the flags of `cbmir evaluate`."""

from cbmir_spark.cli.app import main

if __name__ == "__main__":
    main("evaluate")
