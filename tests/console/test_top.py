"""`antefix top` shows the page's data, sorted and filtered by keys, and never sends a terminal control characters."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest
from rich.console import Console

from antefix_console.cli import main
from antefix_console.top.screen import Choice, screen
from tests.waiting import AT_MOST_S


def totals(**changed):
    zero = dict.fromkeys(("requests", "failed", "prompt_tokens", "hit_tokens", "output_tokens", "num_with_ttft"), 0)
    return {**zero, "charged": 0.0, "saved": 0.0, "ttft_s": 0.0, **changed}


def request(number, **changed):
    fields = {
        "id": f"request-{number}",
        "at": 90.0,
        "tenant": "acme",
        "status": "stop",
        "prompt_tokens": 1000,
        "hit_tokens": 900,
        "miss_tokens": 100,
        "plan": "checkpoint",
        "miss_reason": "first_seen",
        "ttft_s": 0.25,
    }
    return fields | changed


DATA = {
    "at": 100.0,
    "started_at": 0.0,
    "version": "9",
    "model": "m",
    "running": 1,
    "refused": 2,
    "total": totals(requests=3, prompt_tokens=3000, hit_tokens=1800),
    "over": {
        "60": totals(),
        "300": totals(num_with_ttft=2, ttft_s=1.0),
        "3600": totals(prompt_tokens=10, hit_tokens=5),
    },
    "workers": [
        {
            "role": "prefill",
            "address": "h:1",
            "serving": False,
            "draining": False,
            "requests": 4,
            "tokens_queued": 12345678,
            "served": 5,
        }
    ],
    "tenants": [
        {"tenant": "small", "miss_tokens": {"evicted": 5}, **totals(requests=9, prompt_tokens=100)},
        {"tenant": "large", "miss_tokens": {}, **totals(requests=1, prompt_tokens=5000, hit_tokens=5000)},
    ],
    "requests": [
        request(1),
        request(2, tenant="small", miss_reason="evicted"),
        request(3, miss_tokens=0, miss_reason="", hit_tokens=1000),
        request(4, status="failed"),
    ],
}


def shown(choice=None, data=DATA, height=60):
    out = io.StringIO()
    Console(file=out, width=150).print(screen(data, choice or Choice(), height=height, problem=""))
    return out.getvalue()


def test_totals_and_roles_are_there():
    text = shown()
    assert "1 hour 50.0%" in text and "since the start 60.0%" in text and "first token 500 ms" in text
    assert "does not answer" in text and "12.3M" in text


def test_keys_sort_and_filter():
    assert shown().index("1 large") < shown().index("2 small")
    by_requests = Choice().after("s").after("s")
    assert by_requests.tenants_by == "requests" and shown(by_requests).index("1 small") < shown(by_requests).index(
        "2 large"
    )
    misses, everything, failed = Choice(), Choice().after("f"), Choice().after("f").after("f")
    assert "request-3" not in shown(misses) and "request-1" in shown(misses)
    assert "request-3" in shown(everything)
    assert "request-4" in shown(failed) and "request-1" not in shown(failed)
    one = Choice().after("2")
    assert "request-2" in shown(one) and "request-1" not in shown(one)
    assert one.after("2") == Choice() and one.after("x") == one.after("\u00b2") == one


def test_a_small_terminal_shows_fewer_requests():
    many = DATA | {"requests": [request(number) for number in range(100)]}
    assert shown(data=many, height=24).count("request-") < shown(data=many, height=60).count("request-") == 20


def test_stores_are_shown_one_by_one_and_hits_with_their_tiers():
    store = {"name": "a", "answers": True, "used_bytes": 5e9, "budget_bytes": 64e9, "records": 7, "evictions": 0}
    sound = store | {"failures": 0, "stopped": ""}
    stores = [sound, sound | {"name": "b", "answers": False, "failures": 3}]
    asked = [request(1, hit_tiers={"memory": 1, "peer:b": 2})]
    text = shown(data=DATA | {"store": {"stores": stores}, "requests": asked})
    assert "5.0G" in text and "64.0G" in text and "memory+peer:b" in text
    assert "answers" in next(line for line in text.splitlines() if line.startswith("a "))
    assert "does not answer" in next(line for line in text.splitlines() if line.startswith("b "))
    full = [store | {"failures": 0, "stopped": "the disk is full"}]
    assert "stores nothing: the disk is full" in shown(data=DATA | {"store": {"stores": full}})
    assert "stores" not in shown(data=DATA | {"store": {"stores": []}}).splitlines()


def test_what_a_terminal_would_obey_is_spelled_out():
    text = shown(data=DATA | {"requests": [request(1, tenant="a\x1b[2J")], "model": "\x1b]0;x\x07"})
    assert "\x1b" not in text and "\\x1b" in text


def test_no_router_is_told_in_one_line(capsys):
    assert main(["top", "--url", "http://127.0.0.1:1"]) == 3
    assert capsys.readouterr().err.startswith("antefix: no router answers at http://127.0.0.1:1")


@pytest.mark.services
def test_in_a_terminal_it_watches_and_q_ends_it(tmp_path):
    """Runs in a real terminal, with a server that gives the same data each time."""
    served = tmp_path / "served" / "ui"
    served.mkdir(parents=True)
    (served / "data").write_text(json.dumps(DATA))
    server = subprocess.Popen(
        [
            sys.executable,
            "-u",
            "-m",
            "http.server",
            "0",
            "--bind",
            "127.0.0.1",
            "--directory",
            str(tmp_path / "served"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        port = server.stdout.readline().split(" port ")[1].split()[0]
        ours, theirs = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "150", "LINES": "50"}
        command = [sys.executable, "-m", "antefix_console", "top", "--url", f"http://127.0.0.1:{port}"]
        top = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        seen = read_until(ours, b"request-1")
        os.write(ours, b"f")
        seen += read_until(ours, b"request-3")
        os.write(ours, b"q")
        assert top.wait(AT_MOST_S) == 0, seen.decode(errors="replace")
        os.close(ours)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def read_until(descriptor, text):
    seen, ends = b"", time.monotonic() + AT_MOST_S
    while text not in seen and time.monotonic() < ends:
        if select.select([descriptor], [], [], 0.5)[0]:
            seen += os.read(descriptor, 65536)
    assert text in seen, seen.decode(errors="replace")
    return seen
