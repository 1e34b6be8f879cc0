#!/bin/sh
# Print the path of a Python of the given version (3.12) that can create environments; exit 1 if this machine has none.
# Looks on PATH, then among pyenv's versions: a shim of pyenv on PATH fails where that version is not switched on.
version=$1
works() { "$1" -c 'import sys, venv, ensurepip; sys.exit("%d.%d" % sys.version_info[:2] != sys.argv[1])' "$version" 2>/dev/null; }

for candidate in "$(command -v "python$version")" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/"python$version"; do
  if [ -n "$candidate" ] && works "$candidate"; then
    echo "$candidate"
    exit 0
  fi
done
exit 1
