"""Writes every frame that crosses the switch into a file, until the process ends. Runs in the switch's namespace."""

import socket
import sys
from pathlib import Path

ETH_P_ALL = 3

tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
print("ready", flush=True)
with tap, Path(sys.argv[1]).open("wb", buffering=0) as out:
    while True:
        out.write(tap.recv(1 << 16))
