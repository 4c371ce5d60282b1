"""A real Prometheus on this machine; it scrapes and evaluates alerts each second."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from support.program import PATIENCE_SECONDS, free_port
from support.system import program


class Prometheus:
    """One run of Prometheus, and its HTTP API."""

    def __init__(self, directory: Path, target: str, rules: Path) -> None:
        """Scrape `target` (host:port) under the job name that the alerts' comment gives."""
        path, port = program("prometheus"), free_port()
        # JSON is valid YAML.
        (directory / "prometheus.yml").write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                    "rule_files": [str(rules)],
                    "scrape_configs": [
                        {"job_name": "sse_labels", "static_configs": [{"targets": [target]}]}
                    ],
                }
            )
        )
        self._log = directory / "prometheus.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    path,
                    f"--config.file={directory / 'prometheus.yml'}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_SECONDS, verify=False
        )

    def ready(self) -> bool:
        """Whether it answers."""
        assert self.process.poll() is None, self._log.read_text()
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def get(self, path: str, **parameters: Any) -> Any:
        """The `data` of one answer of its API; fails on errors and warnings."""
        answer = self._client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", (parameters, answer)
        assert not answer.get("warnings"), (parameters, answer)
        return answer["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The value of an expression now: labels and value of each series."""
        found = self.get("query", query=expression)
        assert found["resultType"] == "vector", expression
        return [(each["metric"], float(each["value"][1])) for each in found["result"]]

    def has_numbers(self, expression: str) -> bool:
        """Whether an expression gives series now, and all of them have a number."""
        found = self.query(expression)
        return bool(found) and not any(math.isnan(value) for _, value in found)

    def rules(self) -> list[dict[str, Any]]:
        """All rules, with the result of their last evaluation."""
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]

    def firing(self) -> dict[str, dict[str, Any]]:
        """The alerts that fire now, by name."""
        return {
            alert["labels"]["alertname"]: alert
            for alert in self.get("alerts")["alerts"]
            if alert["state"] == "firing"
        }

    def until(self, enough: Callable[[], Any], what: str = "what was expected") -> None:
        """Wait until `enough()` is true."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not enough():
            if time.monotonic() > deadline:
                log = self._log.read_text()[-2000:]
                raise AssertionError(f"{what} did not come; it fires: {self.firing()}\n{log}")
            time.sleep(0.05)

    def close(self) -> None:
        """End it."""
        self._client.close()
        self.process.terminate()
        try:
            self.process.wait(PATIENCE_SECONDS)
        finally:
            self.process.kill()

    def until_scraped(self) -> None:
        """Wait until the server was scraped. Prometheus starts in 5 s: start it first."""
        self.until(self.ready, "an answer of Prometheus")
        self.until(lambda: self.query("up == 1"), "a scrape")


@contextmanager
def prometheus(directory: Path, target: str, rules: Path) -> Iterator[Prometheus]:
    """Run it with its data in `directory`."""
    server = Prometheus(directory, target, rules)
    try:
        yield server
    finally:
        server.close()
