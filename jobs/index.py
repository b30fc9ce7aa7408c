"""`spark-submit jobs/index.py …`: the flags of `cbmir index`."""

from cbmir_spark.cli.app import main

if __name__ == "__main__":
    main("index")
