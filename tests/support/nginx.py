"""A real nginx with the site file for operators; only its ports and paths differ."""

from __future__ import annotations

import getpass
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from support.program import PATIENCE_SECONDS, REPOSITORY, free_port
from support.system import program

SITE = REPOSITORY / "nginx/sse_labels.conf"
#: The settings that the site's first lines ask operators for, and paths of the test.
MAIN = """
daemon off;
{user}
worker_processes 2;
worker_rlimit_nofile 8192;
worker_shutdown_timeout 1s;
pid {directory}/pid;
error_log stderr;
events {{ worker_connections 4096; }}
http {{
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    include {directory}/site.conf;
}}
"""


class Nginx:
    """One run of nginx."""

    def __init__(
        self, directory: Path, upstreams: Sequence[int], faults: Mapping[str, str]
    ) -> None:
        self._path = program("nginx")
        self._directory = directory
        self._log = (directory / "errors").open("w+b")
        self.port, self.tls_port = free_port(), free_port()
        self._make_certificate()
        site = self._with_places(SITE.read_text(), upstreams)
        for ours, wrong in faults.items():
            assert ours in site, ours
            site = site.replace(ours, wrong)
        (directory / "site.conf").write_text(site)
        user = "user root;" if getpass.getuser() == "root" else ""
        (directory / "nginx.conf").write_text(MAIN.format(directory=directory, user=user))
        self.process = self._started()

    @property
    def per_address(self) -> int:
        """The site's limit of open requests for one address."""
        return int(SITE.read_text().partition("limit_conn sse_labels_readers ")[2].split(";")[0])

    @property
    def url(self) -> str:
        """The address without TLS."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def certificate(self) -> Path:
        """The certificate that clients must trust."""
        return self._directory / "certificate.pem"

    def check(self) -> str:
        """The output of `nginx -t` for the configuration."""
        done = subprocess.run([*self._command(), "-t"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stderr

    def reload(self) -> list[int]:
        """Reload, as `nginx -s reload` does; return the pids of the old workers."""
        workers = self._workers()
        subprocess.run([*self._command(), "-s", "reload"], check=True, stderr=self._log)
        return workers

    def restart(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it at once with all its streams, and start it again."""
        workers = self._workers()
        self.process.send_signal(number)
        self.process.wait(PATIENCE_SECONDS)
        for pid in workers:
            # Workers of a killed master go on without it and keep the ports.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process = self._started()

    def errors(self) -> str:
        """Its error log."""
        return (self._directory / "errors").read_text(errors="replace")

    def close(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE_SECONDS)
        self._log.close()

    def _workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def _started(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            self._command(), stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL
        )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._listens():
            assert process.poll() is None, self.errors()
            assert time.monotonic() < deadline, self.errors()
            time.sleep(0.01)
        return process

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _command(self) -> list[str]:
        return [self._path, "-e", "stderr", "-c", str(self._directory / "nginx.conf")]

    def _with_places(self, site: str, upstreams: Sequence[int]) -> str:
        """Return the site with the test's ports and paths; each text must be in it once."""
        first, second = upstreams[0], upstreams[-1]
        places = {
            "server 127.0.0.1:8080 ": f"server 127.0.0.1:{first} ",
            "listen 8081;": f"listen 127.0.0.1:{self.port};",
            "listen 443 ssl http2;": f"listen 127.0.0.1:{self.tls_port} ssl http2;",
            "/etc/ssl/certs/ssl-cert-snakeoil.pem": f"{self._directory}/certificate.pem",
            "/etc/ssl/private/ssl-cert-snakeoil.key": f"{self._directory}/key.pem",
            "/var/log/nginx/sse_labels.log": f"{self._directory}/access.log",
        }
        if len(upstreams) > 1:
            # The line that the site's comment gives for a second server.
            places["#server 127.0.0.1:8082 "] = f"server 127.0.0.1:{second} "
        for ours, tests in places.items():
            assert site.count(ours) == 1, ours
            site = site.replace(ours, tests)
        return site

    def _make_certificate(self) -> None:
        subprocess.run(
            [
                *(program("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt"),
                *("ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
                *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
                *("-keyout", str(self._directory / "key.pem")),
                *("-out", str(self.certificate)),
            ],
            check=True,
            capture_output=True,
        )


@contextmanager
def nginx(*upstreams: int, faults: Mapping[str, str] | None = None) -> Iterator[Nginx]:
    """Run it before servers on these ports; `faults` maps texts of the site to wrong ones."""
    with tempfile.TemporaryDirectory(prefix="sse-labels-nginx-") as directory:
        server = Nginx(Path(directory), upstreams, faults or {})
        try:
            yield server
        finally:
            server.close()
