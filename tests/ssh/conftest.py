"""A real sshd on loopback with keys of its own, and a "box" behind it: a state home with one live run and its hub."""

from __future__ import annotations

import dataclasses
import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.wire.messages import RunStatus
from tests.harness import ROOT
from tests.harness.fakehub import FakeHub
from tests.harness.fakerun import write_run
from tests.harness.waiting import patient, until

SSHD = "/usr/sbin/sshd"


@dataclasses.dataclass
class Box:
    """What the tests call user@box: this machine through sshd, with another state home."""

    target: str
    state_home: Path
    folder: Path

    def write_run(self, name: str, sockets: Path, status: RunStatus) -> Path:
        """A live-looking run directory there; its supervisor is this process."""
        return write_run(self.state_home, name, sockets, status)


@pytest.fixture(scope="session")
def box_folder() -> Iterator[Path]:
    # Not tmp_path: a Unix socket's path holds 107 characters.
    with tempfile.TemporaryDirectory(prefix="zt-ssh-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def sshd(box_folder: Path) -> Iterator[Box]:
    if not Path(SSHD).exists():
        pytest.skip(f"no {SSHD}: install openssh-server to test attaching over SSH")
    if shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        pytest.skip("no ssh or ssh-keygen: install openssh-client to test attaching over SSH")
    for name in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(box_folder / f"key-{name}")], check=True
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    state_home = box_folder / "state"
    state_home.mkdir()
    paths = f'XDG_STATE_HOME={state_home} "PYTHONPATH={ROOT}" PYTHONDONTWRITEBYTECODE=1'
    server = box_folder / "sshd_config"
    server.write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {box_folder}/key-host\n"
        f"AuthorizedKeysFile {box_folder}/key-user.pub\nStrictModes no\nUsePAM no\nPidFile none\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        # What talkative start-up files do to every answer.
        'ForceCommand echo "Welcome to the box!"; eval "$SSH_ORIGINAL_COMMAND"\n'
        f"SetEnv {paths}\n"
    )
    host_key = (box_folder / "key-host.pub").read_text().split()[:2]
    (box_folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {' '.join(host_key)}\n")
    user = getpass.getuser()
    (box_folder / "ssh_config").write_text(
        f"Host box\n HostName 127.0.0.1\n Port {port}\n IdentityFile {box_folder}/key-user\n"
        f" IdentitiesOnly yes\n UserKnownHostsFile {box_folder}/known_hosts\n GlobalKnownHostsFile none\n"
        " IdentityAgent none\n"
        f"Host strange\n HostName 127.0.0.1\n Port {port}\n IdentityFile {box_folder}/key-user\n"
        f" IdentitiesOnly yes\n UserKnownHostsFile none\n GlobalKnownHostsFile none\n BatchMode yes\n"
        "Host nobody\n HostName 127.0.0.1\n Port 1\n"
    )
    separation = Path(
        "/run/sshd"
    )  # where sshd puts its unprivileged half when root starts it; the package's unit makes it
    made = os.getuid() == 0 and not separation.exists()
    if made:
        separation.mkdir(mode=0o755)
    log = box_folder / "sshd.log"
    process = subprocess.Popen([SSHD, "-D", "-f", str(server), "-E", str(log)])
    try:
        until(lambda: process.poll() is not None or _listens(port), log.read_text)
        assert process.poll() is None, log.read_text()
        config = box_folder / "ssh_config"
        tried = subprocess.run(
            ["ssh", "-F", str(config), "box", "true"], capture_output=True, text=True, timeout=patient(20)
        )
        if tried.returncode:
            pytest.skip(f"sshd does not let {user} in: {tried.stderr.strip()}; {log.read_text()[-300:]}")
        yield Box(f"{user}@box", state_home, box_folder)
    finally:
        process.terminate()
        process.wait(patient(10))
        if made:
            separation.rmdir()


@pytest.fixture
def box(sshd: Box, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Box:
    """The box as an empty one that knows its zerotop, and our side with a state home of its own."""
    monkeypatch.setenv("ZEROTOP_SSH", f"ssh -F {sshd.folder / 'ssh_config'}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "here"))
    home = sshd.state_home / "zerotop"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    (home / "executable").write_text(sys.executable + "\n")
    return sshd


@pytest.fixture
def hub(box: Box) -> Iterator[FakeHub]:
    """A hub on the box, with the live run q1."""
    folder = box.folder / "hub"
    folder.mkdir(exist_ok=True)
    hub = FakeHub(folder)
    hub.messages[0] = status = RunStatus(name="q1", state="running", attempt=1, step=3)
    box.write_run("q1", folder, status)
    yield hub
    hub.close()
    shutil.rmtree(folder)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
