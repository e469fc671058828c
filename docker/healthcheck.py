"""Ends with 0 when the service in this container says that it is well: ``healthcheck.py VARIABLE PATH``.

VARIABLE is the environment variable that holds the port. Proxies are not asked, whatever the environment says.
"""

import http.client
import os
import sys

variable, path = sys.argv[1:]
connection = http.client.HTTPConnection("127.0.0.1", int(os.environ[variable]), timeout=4)
try:
    connection.request("GET", path)
    answer = connection.getresponse()
    print(answer.status, answer.read(1000).decode(errors="replace"))
except OSError as error:
    sys.exit(f"port {os.environ[variable]}: {error}")
sys.exit(0 if answer.status == http.HTTPStatus.OK else 1)
