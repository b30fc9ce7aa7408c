"""`python -m cbmir_spark` is `cbmir`."""

from cbmir_spark.cli.app import main

if __name__ == "__main__":
    main()
