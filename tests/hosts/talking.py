"""Runs conversations over HTTPS on its own host: python -m tests.hosts.talking --ca FILE --key FILE DOOR...

Reads commands as lines of JSON, and answers each with its state so far.
    {}  nothing
    {"doors": [...]}  others from now on
    {"breaks": true}  a door may die in a request: ask another one
    {"stop": true}  end when all that runs has ended
"""

from __future__ import annotations

import argparse
import json
import ssl
import sys
from pathlib import Path

from tests.upgrade.conversations import Talk


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ca", required=True)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("doors", nargs="+")
    args = parser.parse_args()
    tls = ssl.create_default_context(cafile=args.ca)
    talk = Talk(args.doors, tls=tls, api_key=args.key.read_text().strip())
    talk.start()
    for line in sys.stdin:
        command = json.loads(line)
        talk.doors = command.get("doors", talk.doors)
        talk.doors_break = command.get("breaks", talk.doors_break)
        if command.get("stop"):
            talk.stop()
        said = {
            "rounds": talk.rounds,
            "failed": talk.failed,
            "wrong": talk.wrong,
            "cached": {f"{number}.{turn}": tokens for (number, turn), tokens in talk.cached.items()},
            "sent": talk.sent,
            "again": talk.num_again,
        }
        print(json.dumps(said), flush=True)
        if command.get("stop"):
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
