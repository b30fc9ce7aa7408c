#!/usr/bin/env bash
# Names what a machine lacks before anything is installed on it. Usage: check_machine.sh PYTHON
set -euo pipefail

python=${1:-}
problems=0

say() {
  printf 'cbmir: %s\n' "$1" >&2
  problems=1
}

if [ -z "$python" ] || ! command -v "$python" >/dev/null; then
  say 'Python is missing: install Python 3.11 with venv (Debian: python3.11-venv), or give it as make PYTHON=/path/to/python3.11'
else
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if [ "$version" != 3.11 ]; then
    say "Python $version at $python cannot run the pinned packages: install Python 3.11, or give it as make PYTHON=/path/to/python3.11"
  elif ! "$python" -c 'import ensurepip' 2>/dev/null; then
    say "Python at $python has no venv: install it (Debian: python3.11-venv)"
  fi
fi

java=${JAVA_HOME:+$JAVA_HOME/bin/java}
java=${java:-java}
if ! command -v "$java" >/dev/null; then
  say 'Java is missing: install OpenJDK 17 (Debian: openjdk-17-jre-headless), or set JAVA_HOME to one'
else
  major=$("$java" -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | head -n 1)
  case "$major" in
    17 | 21) ;;
    *) say "Java ${major:-of unknown version} at $java cannot run Spark 4: install OpenJDK 17 (Debian: openjdk-17-jre-headless), or set JAVA_HOME to one" ;;
  esac
fi

exit "$problems"
