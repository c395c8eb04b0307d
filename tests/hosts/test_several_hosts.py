"""Six hosts with TLS between them, as network namespaces of one machine: `make test-hosts`, as root.

examples/several_hosts.sh makes the hosts. Conversations run while links are cut, and all frames between hosts are read.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "several_hosts.sh"
TEXT = "The canary sings at midnight, and the fox answers from the hill. " * 20
HOSTS = ("store", "router", "prefill1", "prefill2", "decode1", "decode2")

pytestmark = [pytest.mark.hosts, pytest.mark.services, pytest.mark.timeout(1200)]


def can_make_namespaces():
    try:
        made = subprocess.run(["ip", "netns", "add", "afx-probe"], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "delete", "afx-probe"], capture_output=True, check=False)
    except OSError:
        return False
    return made.returncode == 0


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    if not can_make_namespaces():
        pytest.skip("network namespaces cannot be made here: that needs root and iproute2")
    directory = tmp_path_factory.mktemp("hosts")
    bin_dir = directory / "bin"
    bin_dir.mkdir()
    antefix = bin_dir / "antefix"
    antefix.write_text(f'#!/bin/sh\nexec {sys.executable} -m antefix_console "$@"\n')
    antefix.chmod(0o755)
    environment = os.environ | {"PATH": f"{bin_dir}:{os.environ['PATH']}"}
    running = Hosts(directory / "deployment", environment)
    try:
        running.run("up", running.directory)
        yield running
    finally:
        running.run("down", running.directory)


class Hosts:
    def __init__(self, directory, environment):
        self.directory = directory
        self.environment = environment

    def run(self, *command, check=True):
        done = subprocess.run(
            [SCRIPT, *map(str, command)], env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done

    def ask(self, text):
        answer = json.loads(self.run("ask", self.directory, text).stdout)
        assert "choices" in answer, answer
        return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    def on(self, host, *command, check=True):
        return self.run("on", host, *command, check=check)

    def start_on(self, host, *command):
        return subprocess.Popen(
            ["ip", "netns", "exec", f"afx-{host}", *command],
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
        )


def test_nothing_readable_crosses_and_hits_cross_hosts(hosts, tmp_path):
    captured = tmp_path / "frames"
    tap = hosts.start_on("switch", sys.executable, str(ROOT / "tests" / "hosts" / "capture.py"), str(captured))
    try:
        assert tap.stdout.readline() == "ready\n"
        # 1. A control: the capture does see unencrypted bytes.
        listener = hosts.start_on("decode2", sys.executable, "-c", LISTEN)
        assert listener.stdout.readline() == "ready\n"
        hosts.on(
            "client", "curl", "--silent", "--max-time", "5", "http://decode2.antefix.test:9999/in-clear", check=False
        )
        listener.wait(20)
        listener.stdout.close()
        # 2. A conversation: the second turn hits what the first one stored.
        first, none = hosts.ask(TEXT)
        again, hit = hosts.ask(TEXT)
        assert first == again and none == 0 and hit > 1000
        time.sleep(2)
    finally:
        tap.kill()
        tap.wait()
        tap.stdout.close()
    frames = captured.read_bytes()
    assert b"/in-clear" in frames
    assert len(frames) > 1_000_000
    # 3. No text, no key, no secret, no token ids, no record of the store.
    secret = (hosts.directory / "secret").read_text().strip()
    told = {
        "text": b"canary sings",
        "API key": (hosts.directory / "api.key").read_bytes().strip(),
        "secret": bytes.fromhex(secret),
        "secret in hex": secret.encode(),
        "password of Redis": (hosts.directory / "redis.password").read_bytes().strip(),
        "methods of services": b"antefix.v1",
        "tenant": b"acme",
        "keys of window state in Redis": b"antefix:",
    }
    assert [what for what, found in told.items() if found in frames] == []
    files = [path for path in (hosts.directory / "store").rglob("*") if path.is_file()]
    begun = b"".join(path.open("rb").read(4 << 20) for path in files)
    samples = (begun[at : at + 32] for at in range(0, len(begun), 4096 + 512))
    telling = [sample for sample in samples if len(set(sample)) > 16][:200]
    assert len(telling) > 20 and not [sample for sample in telling if sample in frames]


@pytest.mark.parametrize("host", ["decode1", "decode2", "prefill1", "prefill2", "store"])
def test_a_cut_link_costs_no_answer(hosts, host):
    expected, _ = hosts.ask(TEXT)
    hosts.run("cut", hosts.directory, host)
    try:
        for turn in range(2):
            assert hosts.ask(TEXT)[0] == expected
            hosts.ask(f"{TEXT} Turn {turn} without {host}.")
    finally:
        hosts.run("heal", hosts.directory, host)
    # After the link is restored, the conversation hits again.
    within(60, lambda: hosts.ask(TEXT)[1] > 1000)
    assert hosts.ask(TEXT)[0] == expected


def test_a_stranger_on_the_network_is_refused(hosts):
    for host, port in (("store", 7001), ("router", 7000), ("prefill1", 7002), ("decode1", 7002)):
        done = hosts.on("client", sys.executable, "-c", STRANGER, f"{host}.antefix.test:{port}", check=False)
        assert "refused" in done.stdout, (host, done.stdout, done.stderr)
    answer = hosts.on(
        "client",
        "curl",
        "--silent",
        "--max-time",
        "20",
        "--insecure",
        "--data",
        "{}",
        "https://router.antefix.test:8000/v1/completions",
    )
    assert json.loads(answer.stdout)["error"]["type"] == "authentication_error"


def test_doctor_checks_the_deployment_from_any_host(hosts):
    credentials = f"ANTEFIX_CREDENTIALS={hosts.directory / 'credentials' / 'operator'}"
    command = ("env", credentials, "antefix", "doctor", "--deployment", "router.antefix.test:7000", "--json")
    found = json.loads(hosts.on("client", *command).stdout)
    checks = {each["check"]: each["status"] for each in found["findings"]}
    assert found["ok"] and set(checks.values()) == {"ok"}
    assert len([check for check in checks if ":700" in check]) == len(HOSTS)
    # The error names the host that cannot be reached.
    hosts.run("cut", hosts.directory, "decode2")
    try:
        found = json.loads(hosts.on("client", *command, check=False).stdout)
        failed = [each["check"] for each in found["findings"] if each["status"] == "fail"]
        assert failed == ["decode decode2.antefix.test:7002"], found
    finally:
        hosts.run("heal", hosts.directory, "decode2")


def test_only_what_was_told_to_listens(hosts):
    for host in HOSTS:
        shown = hosts.on(host, "ss", "--listening", "--tcp", "--numeric", "--no-header").stdout
        open_to_all = {int(match) for match in re.findall(r"\s(?:0\.0\.0\.0|\*|\[::\]):(\d+)\s", shown)}
        wanted = {"store": {7001, 6379}, "router": {7000, 8000}}.get(host, {7002})
        assert open_to_all <= wanted, (host, shown)


def within(seconds, holds):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if holds():
            return
        time.sleep(2)
    raise AssertionError(f"not within {seconds} s")


LISTEN = """
import socket
with socket.create_server(("0.0.0.0", 9999)) as server:
    print("ready", flush=True)
    connection, _ = server.accept()
    connection.recv(4096)
"""

# Neither a gRPC client without a certificate nor one without TLS can make a call.
STRANGER = """
import sys, grpc
address = sys.argv[1]
said = []
for channel in (grpc.secure_channel(address, grpc.ssl_channel_credentials()), grpc.insecure_channel(address)):
    try:
        channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=10)
        said.append("answered")
    except grpc.RpcError as err:
        said.append(err.code().name)
    channel.close()
print("refused" if set(said) <= {"UNAVAILABLE", "DEADLINE_EXCEEDED"} else said)
"""
