"""Nchan: where it is, how it comes here, and its configuration.

It is a module of nginx and comes from Debian. Root on Debian gets it; nobody else is asked to.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin") or "/usr/sbin/nginx"
PACKAGES = ["nginx", "libnginx-mod-nchan"]
_MODULES = [Path("/usr/lib/nginx/modules/ngx_nchan_module.so")]


#: Messages that it keeps, in memory.
BUFFER = 200_000


class NotInstalled(Exception):
    """Why there is no Nchan."""


#: One worker, as the other servers are one process. Messages are kept for subscribers that are
#: slower than the publisher: without it Nchan loses what the others would still deliver.
_CONFIGURATION = """
load_module {module};
daemon off;
worker_processes 1;
{user}
pid {folder}/nginx.pid;
events {{ worker_connections 16000; multi_accept on; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000000;
  nchan_shared_memory_size 512M;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location = /pub {{
      nchan_publisher;
      nchan_channel_id labels;
      nchan_message_buffer_length {buffer};
      nchan_message_timeout 1h;
    }}
    location = /sub {{
      nchan_subscriber eventsource;
      nchan_channel_id labels;
      nchan_subscriber_first_message newest;
    }}
    location = /history {{
      nchan_subscriber eventsource;
      nchan_channel_id labels;
      nchan_subscriber_first_message oldest;
    }}
    location / {{ return 404; }}
  }}
}}
"""


def installed() -> tuple[str, Path]:
    """Its version and its file, installed now if need be; raise NotInstalled with the reason."""
    found = _find()
    if found is None:
        if shutil.which("apt-get") is None:
            raise NotInstalled("Nchan is not installed, and this is not Debian")
        if os.geteuid() != 0:
            raise NotInstalled(f"Nchan is not installed: sudo apt-get install {' '.join(PACKAGES)}")
        _install()
        found = _find()
    if found is None:
        raise NotInstalled(f"no {_MODULES[0].name} although {PACKAGES[1]} is installed")
    return found


def _find() -> tuple[str, Path] | None:
    module = next((path for path in _MODULES if path.exists()), None)
    if module is None or not Path(NGINX).exists():
        return None
    said = subprocess.run([NGINX, "-v"], capture_output=True, text=True).stderr.strip()
    query = ["dpkg-query", "-W", "-f", "${Version}", PACKAGES[1]]
    version = "of unknown version"
    if shutil.which("dpkg-query"):
        version = subprocess.run(query, capture_output=True, text=True).stdout or version
    return f"Nchan {version} in {said.rpartition('/')[0]} {said.rpartition('/')[2]}", module


def _install() -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (
        ["update", "-qq"],
        ["install", "-qq", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=120", *PACKAGES],
    ):
        done = subprocess.run(
            ["apt-get", *arguments], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise NotInstalled(f"apt-get {arguments[0]} failed: {done.stderr.strip()[-300:]}")


def configure(folder: Path, module: Path, port: int) -> None:
    """Write nginx.conf into the folder."""
    # As root the worker would become another user, whom the folder does not belong to.
    user = "user root;" if os.geteuid() == 0 else ""
    text = _CONFIGURATION.format(folder=folder, module=module, port=port, user=user, buffer=BUFFER)
    (folder / "nginx.conf").write_text(text)
