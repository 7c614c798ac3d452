"""A real S3 server on loopback: OpenStack Swift with its s3api, in a venv of its own (`make swift`).

One proxy, account, container and object server each, one device, one replica, started in a few seconds. Swift keeps
metadata in extended attributes, so its folder must be on a file system that has them (ext4, xfs, btrfs).
"""

import ctypes
import http.client
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.store import S3Store

BIN = Path(__file__).parents[2] / ".venv-swift" / "bin"
PARTS = ("account", "container", "object", "proxy")
KEY, SECRET = "test:tester", "testing"
START_SECONDS = 60.0

BACKEND = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {root}
devices = {root}/devices
mount_check = false
fallocate_reserve = 0
log_address = {root}/no-syslog
[pipeline:main]
pipeline = {part}-server
[app:{part}-server]
use = egg:swift#{part}
allow_open_expired = false
"""

PROXY = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
workers = 0
user = {user}
swift_dir = {root}
log_address = {root}/no-syslog
[pipeline:main]
pipeline = catch_errors s3api tempauth copy slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
dns_compliant_bucket_names = true
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
"""

SWIFT = """
[swift-hash]
swift_hash_path_suffix = gsae
swift_hash_path_prefix = gsae
[storage-policy:0]
name = one
default = yes
"""


def is_installed() -> bool:
    """Whether the servers are there to be started."""
    return (BIN / "swift-proxy-server").exists()


@dataclass
class Swift:
    """Servers under `root`; `stop` and `start` may be called again and again, the objects stay."""

    root: Path
    ports: dict[str, int]
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What a client of this server needs in its environment."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports['proxy']}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false",
        }

    def start(self) -> None:
        """Start all servers and wait until the proxy answers."""
        for part in PARTS:
            log = (self.root / f"{part}.log").open("ab")
            command = [str(BIN / f"swift-{part}-server"), str(self.root / f"{part}-server.conf")]
            process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, preexec_fn=_die_with_parent
            )
            self.running.append(process)
            log.close()
        deadline = time.monotonic() + START_SECONDS
        while not all(_answers(port) for port in self.ports.values()):
            if time.monotonic() > deadline or any(p.poll() is not None for p in self.running):
                self.stop()
                raise RuntimeError(f"Swift does not start; see {self.root}/*.log.")
            time.sleep(0.05)

    def stop(self) -> None:
        """Kill all servers, as a crash would; the proxy first, which without the others calls every object missing."""
        for process in reversed(self.running):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.running.clear()

    def logs(self) -> str:
        """Return the end of every server's log."""
        return "\n".join(f"{p.name}: {p.read_text()[-2000:]}" for p in sorted(self.root.glob("*.log")))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no servers are left when the tests are killed


def _answers(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/healthcheck")
        connection.getresponse().read()
        connection.close()
    except OSError:
        return False
    return True


@contextmanager
def serving(root: Path) -> Iterator[Swift]:
    """Lay out a cluster under `root` and run it."""
    ports = dict(zip(PARTS, _free_ports(len(PARTS)), strict=True))
    user = subprocess.check_output(["id", "-un"], text=True).strip()
    (root / "swift.conf").write_text(SWIFT)
    (root / "devices" / "d1").mkdir(parents=True)
    for part, port in ports.items():
        template = PROXY if part == "proxy" else BACKEND
        (root / f"{part}-server.conf").write_text(template.format(part=part, port=port, root=root, user=user))
        if part != "proxy":
            _ring(root, part, port)
    swift = Swift(root, ports)
    swift.start()
    try:
        yield swift
    finally:
        swift.stop()


def _ring(root: Path, part: str, port: int) -> None:
    builder = [str(BIN / "swift-ring-builder"), f"{part}.builder"]
    for arguments in (["create", "4", "1", "0"], ["add", f"r1z1-127.0.0.1:{port}/d1", "1"], ["rebalance"]):
        subprocess.run([*builder, *arguments], cwd=root, check=True, stdout=subprocess.DEVNULL)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def make_bucket(name: str) -> None:
    """Make a bucket on the server that the environment names: the one request that obstore has no call for."""
    url = obstore.sign(S3Store(name), "PUT", "", timedelta(minutes=1))
    with urllib.request.urlopen(urllib.request.Request(url, method="PUT")):
        pass
