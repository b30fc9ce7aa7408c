"""The Spark session, its Python workers, and its failures in one line. Imports no table."""
