"""`python -m cbmir_spark` is `cbmir`."""

import sys


def main() -> None:
    """Run the command line, which is imported here so that Ctrl-C during its imports ends in a line, too."""
    try:
        from cbmir_spark.cli import app
    except KeyboardInterrupt:
        sys.stderr.write("cbmir: interrupted\n")
        raise SystemExit(130) from None
    app.main()


if __name__ == "__main__":
    main()
