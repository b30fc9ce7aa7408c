"""The package list, which pyproject.toml cannot express: every package found, and `conf/` as `cbmir_spark.conf`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["cbmir_spark", "cbmir_spark.*"]), "cbmir_spark.conf"],
    package_dir={"cbmir_spark": "cbmir_spark", "cbmir_spark.conf": "conf"},
)
