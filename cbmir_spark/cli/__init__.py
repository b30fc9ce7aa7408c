"""The command line: argv → settings → the Python API → what a person sees. Import `app.main` alone."""
