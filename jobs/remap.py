"""`spark-submit jobs/remap.py …`: the flags of `cbmir remap`."""

from cbmir_spark.cli.app import main

if __name__ == "__main__":
    main("remap")
