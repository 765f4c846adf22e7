#!/bin/sh
# Runs a compiler and fails where ptxas only informs: wgmma that is serialised (C7510, C7512, C7514,
# C7515), that gets waits or fences which the source does not have (C7517 to C7519), or setmaxnreg that
# is ignored (C7508) still gives right results, at a fraction of the speed.
messages=$("$@" 2>&1)
status=$?
if [ -n "$messages" ]; then
  printf '%s\n' "$messages" >&2
fi
if printf '%s\n' "$messages" | grep -Eq '\(C75(08|10|12|14|15|17|18|19)\)'; then
  echo "ptxas_messages.sh: the message above counts as an error" >&2
  exit 1
fi
exit "$status"
