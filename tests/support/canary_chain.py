"""Runs `cbmir` commands one after the other in one process, as a terminal would: arguments are a JSON list of lists."""

import json
import sys

from cbmir_spark.cli import app as app_module

for arguments in json.loads(sys.argv[1]):
    sys.stdout.write(f"$ cbmir {arguments[0]}\n")
    sys.argv = ["cbmir", *arguments]
    try:
        app_module.main()
    except SystemExit as ended:
        sys.stdout.write(f"= {ended.code or 0}\n")
    sys.stdout.flush()
