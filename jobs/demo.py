"""`spark-submit jobs/demo.py …`: the flags of `cbmir demo`."""

from cbmir_spark.cli.app import main

if __name__ == "__main__":
    main("demo")
