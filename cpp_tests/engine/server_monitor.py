"""Asks /health and /v1/models of a server until standard input ends; a process of its own, so that
nothing but the server keeps it waiting.

    python server_monitor.py PORT     prints {"asked": N, "slowest": seconds, "ready": N}
"""

from __future__ import annotations

import http.client
import json
import select
import sys
import time

SECONDS_BETWEEN = 0.05


def main() -> None:
    port = int(sys.argv[1])
    asked, ready, slowest = 0, 0, 0.0
    while not select.select([sys.stdin], [], [], SECONDS_BETWEEN)[0]:
        for path, allowed in (("/health", (200, 503)), ("/v1/models", (200,))):
            start = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            connection.close()
            slowest = max(slowest, time.monotonic() - start)
            if response.status not in allowed:
                raise SystemExit(f"{path} answered with status {response.status}")
            asked += 1
            ready += response.status == 200
    print(json.dumps({"asked": asked, "ready": ready, "slowest": slowest}))


if __name__ == "__main__":
    main()
