"""What each scenario does, and what must have arrived at its end.

A result is `complete` when every event reached every client, once and in order, and no later than
a second after the last was published where publishing is paced. Else it `falls behind`, with the
rate that it reached, or is `wrong`: an event came twice or out of order.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import quote

from benchmarks import labels, measure, nchan, servers
from benchmarks.servers import SERVICE, Place, Server, Service
from benchmarks.worker import Worker, WorkerError

#: From the heads of the responses to the first event: until all are subscribed.
SETTLE_SECONDS = 1.0
#: Paced events that come later than this after the last one was published: it falls behind.
LATE_SECONDS = 1.0
CONNECT_SECONDS = 120.0
#: A CPU reading is a multiple of 10 ms; shares of less than so many of them say little.
LEAST_CPU_SECONDS = 0.1
#: How long an answer of queryLabels is waited for.
QUERY_SECONDS = 60.0
NO_HISTORY = "keeps no history: each application writes its own"


@dataclass(frozen=True)
class Numbers:
    """How large the scenarios are; the defaults are the full size."""

    a: tuple[int, float, float] = (1000, 200, 10)  # connections, events a second, seconds
    a2: tuple[int, float, float] = (1000, 20, 15)
    b: tuple[int, int] = (100, 20_000)  # connections, events
    c: tuple[int, int] = (10_000, 100)
    d_rows: tuple[int, ...] = (200_000, 1_000_000)
    d_readers: tuple[int, ...] = (1, 20, 500)
    e: tuple[int, int, int] = (10_000, 200, 400)  # clients, least and most events behind
    f: tuple[int, float, float] = (1000, 200, 10)
    f_filters: int = 50
    g_publishers: tuple[int, ...] = (1, 16)
    g_batches: tuple[int, ...] = (1, 100)
    g_seconds: float = 5
    h_connections: tuple[int, ...] = (100, 1000, 10_000)
    h_rate: float = 20
    h_seconds: float = 10
    h_rows: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
    h_read: int = 100_000
    idle: tuple[int, float, float] = (1, 20, 15)
    n_rows: int = 5_000_000
    n_strangers: tuple[int, ...] = (0, 200, 900)
    n_read: int = 200_000
    n_live: tuple[int, float, float] = (20, 20, 5)
    n_queries: int = 24
    s_rows: int = 1_000_000  # a multiple of 200; a tenth is in force
    s_readers: tuple[int, ...] = (1, 20)
    #: How long after its due time a scenario is waited for.
    patience_seconds: float = 60


FULL = Numbers()
SMALL = Numbers(
    a=(100, 200, 2),
    a2=(100, 20, 2),
    b=(20, 2000),
    c=(500, 20),
    d_rows=(5000, 20_000),
    d_readers=(1, 5),
    e=(300, 200, 400),
    f=(100, 200, 2),
    f_filters=10,
    g_seconds=0.5,
    h_connections=(20, 100, 500),
    h_seconds=2,
    h_rows=(1000, 10_000, 100_000),
    h_read=2000,
    idle=(1, 20, 2),
    n_rows=20_000,
    n_strangers=(0, 20),
    n_read=5000,
    n_live=(5, 20, 1),
    n_queries=8,
    s_rows=20_000,
    s_readers=(1, 5),
    patience_seconds=15,
)


@dataclass
class Result:
    """One scenario, or one variant of it, on one server. `None`: not measured."""

    scenario: str
    variant: str
    server: str
    #: `complete`, `falls behind`, `wrong`, or `left out`.
    verdict: str = "left out"
    problems: list[str] = field(default_factory=list)
    version: str = ""
    published_by: str = ""
    #: What the costs are per: a delivery (one event at one client), or a label accepted.
    unit: str = "delivery"
    connections: int = 0
    published: int = 0
    publish_seconds: float | None = None
    expected: int = 0
    deliveries: int = 0
    seconds: float | None = None
    rate: float | None = None
    server_us: float | None = None
    database_us: float | None = None
    server_cpu_seconds: float | None = None
    database_cpu_seconds: float | None = None
    latency_ms: dict[str, float] | None = None
    connect_seconds: float | None = None
    connect_us: float | None = None
    idle_kib: float | None = None
    rss_mib: float | None = None
    peak_mib: float | None = None
    load_cpu: float | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)

    def problem(self, verdict: str, text: str) -> None:
        """Note what is wrong; the worst verdict stays."""
        self.problems.append(text)
        order = ["complete", "falls behind", "wrong"]
        self.verdict = max(self.verdict, verdict, key=order.index)


@dataclass
class Run:
    """What the scenarios of one run share."""

    place: Place
    numbers: Numbers
    load_core: int
    peers: list[str]
    tell: Callable[[str], None] = lambda text: None
    results: list[Result] = field(default_factory=list)

    def everybody(self, *, paced: bool = False) -> list[str]:
        """The service first: the others are compared with it."""
        return [SERVICE, *(self.peers if paced else self.others)]

    @property
    def others(self) -> list[str]:
        """The peers, without the one that is there for paced publishing alone."""
        return [name for name in self.peers if name != servers.NCHAN_SERIAL]

    def opened(
        self, name: str, history: int = 0, kind: str = servers.EVENTS
    ) -> AbstractContextManager[Server]:
        """Start a server by its name."""
        if name == SERVICE:
            return servers.service(self.place, history, kind)
        if name == servers.BEHIND_NGINX:
            return servers.behind_nginx(self.place)
        return servers.PEERS[name](self.place)

    def left_out(self, scenario: str, name: str, why: str) -> None:
        """Keep why a server has no part in a scenario."""
        self.results.append(Result(scenario, "", name, problems=[why]))

    def measured(
        self,
        scenario: str,
        variant: str,
        name: str,
        work: Callable[[Server, Load, Result], None],
        *,
        history: int = 0,
        kind: str = servers.EVENTS,
    ) -> Result:
        """Run one scenario on one server, both ended afterwards, and keep the result."""
        result = Result(scenario, variant, name)
        self.results.append(result)
        self.tell(f"{scenario} {variant} {name}")
        try:
            with self.opened(name, history, kind) as server:
                self.worked(server, result, work)
        except servers.CannotRun as error:
            result.problems.append(str(error))
            result.verdict = "left out"
        except (WorkerError, OSError) as error:
            result.problem("falls behind", f"the scenario broke off: {error}")
        return result

    def worked(
        self, server: Server, result: Result, work: Callable[[Server, Load, Result], None]
    ) -> None:
        """Run one scenario on a server that runs."""
        result.version, result.published_by = server.version, server.how
        with load(self.load_core) as two:
            result.verdict = "complete"
            work(server, two, result)


@dataclass
class Load:
    """The two processes of the load."""

    crowd: Worker
    publisher: Worker


@contextlib.contextmanager
def load(core: int) -> Iterator[Load]:
    """Run the load's processes meanwhile."""
    with contextlib.ExitStack() as stack:
        workers = []
        for module in ("load", "publish"):
            worker = Worker(module, core)
            stack.callback(worker.end)
            workers.append(worker)
        yield Load(*workers)


class Meter:
    """What the server, and its database, used since the meter was made."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._cpu, self._database = server.cpu(), server.database_cpu()
        self._proxy = server.proxy_cpu()

    def read(self, result: Result, units: int) -> None:
        """Note it, divided by so many deliveries or labels."""
        cpu = self._server.cpu() - self._cpu
        result.server_cpu_seconds = cpu
        if units:
            result.server_us = cpu / units * 1e6
        if isinstance(self._server, Service):
            database = self._server.database_cpu() - self._database
            result.database_cpu_seconds = database
            if units:
                result.database_us = database / units * 1e6
        proxy = self._server.proxy_cpu()
        if proxy is not None and self._proxy is not None and units:
            result.more["µs of nginx"] = f"{(proxy - self._proxy) / units * 1e6:.3g}"
        if cpu < LEAST_CPU_SECONDS:
            result.more["coarse"] = f"{cpu:.2f} s of CPU, read to 0.01 s"


def connect(
    server: Server, crowd: Worker, result: Result, groups: list[dict[str, Any]], samples: int
) -> None:
    """Open the connections; note what that took, and the memory of each once all is quiet."""
    result.connections = sum(group["count"] for group in groups)
    before, cpu = server.memory_kib(), server.cpu()
    opened = crowd.ask(
        "connect", host=servers.HOST, port=server.port, groups=groups, samples=samples,
        seconds=CONNECT_SECONDS, per_address=server.per_address,
    )  # fmt: skip
    result.connect_seconds = opened["seconds"]
    time.sleep(SETTLE_SECONDS)
    result.connect_us = (server.cpu() - cpu) / max(1, opened["connected"]) * 1e6
    result.idle_kib = (server.memory_kib() - before) / max(1, opened["connected"])
    if opened["connected"] < result.connections:
        missing = result.connections - opened["connected"]
        result.problem("falls behind", f"{missing} clients got no stream: {opened['refused']}")


def judge(result: Result, got: dict[str, Any], began_ns: int) -> None:
    """Note what the crowd received, and whether it is all."""
    result.expected, result.deliveries = got["expected"], got["deliveries"]
    result.latency_ms, result.load_cpu = got["latency_ms"], got["load_cpu"]
    result.seconds = max(1e-9, (got["last_ns"] - began_ns) / 1e9)
    result.rate = result.deliveries / result.seconds
    result.more["received_bytes"] = got["bytes"]
    if got["clients_short"]:
        missing = got["expected"] - got["deliveries"]
        result.problem(
            "falls behind",
            f"{missing} of {got['expected']} deliveries missing, at {got['clients_short']} clients "
            f"({got['clients_gone']} connections ended)",
        )
    if got["clients_over"]:
        result.problem("wrong", f"{got['clients_over']} clients got more than was published")
    if got["samples_wrong"]:
        result.problem("wrong", f"{got['samples_wrong']} events out of order on sampled clients")
    if result.load_cpu is not None and result.load_cpu > 0.95:
        result.more["load"] = "the load was at its limit too"


def fan_out(
    server: Server,
    two: Load,
    result: Result,
    *,
    groups: list[dict[str, Any]],
    events: int,
    patience: float,
    rate: float | None = None,
    samples: int = 20,
    batch: int = 500,
    first: int = 0,
) -> None:
    """Connect the groups, publish the events, all receive them."""
    connect(server, two.crowd, result, groups, samples)
    two.publisher.ask("target", **server.target)
    seconds = patience if rate is None else events / rate + max(5.0, patience / 2)
    meter = Meter(server)
    two.crowd.tell("receive", seconds=seconds)
    published = None
    try:
        if rate is not None:
            two.publisher.tell("pace", first=first, count=events, rate=rate)
        else:
            two.publisher.tell("burst", first=first, count=events, batch=min(batch, server.batch))
        published = two.publisher.answer()
    finally:
        got = two.crowd.answer()
        meter.read(result, got["deliveries"])
        judge(result, got, published["began_ns"] if published else got["began_ns"])
        result.rss_mib = server.memory_kib() / 1024
        if isinstance(server, Service):
            overflows = server.metrics()["queue_overflows_total"]
            if overflows:
                result.more["ConsumerTooSlow"] = int(overflows)
    result.published = published["count"]
    result.publish_seconds = (published["ended_ns"] - published["began_ns"]) / 1e9
    result.more["publish_requests"] = published["requests"]
    if rate is not None:
        behind = (got["last_ns"] - published["ended_ns"]) / 1e9
        if behind > LATE_SECONDS:
            result.problem(
                "falls behind", f"the last event came {behind:.1f} s after it was published"
            )
        if result.publish_seconds > events / rate + LATE_SECONDS:
            result.problem(
                "falls behind",
                f"it took {events / result.publish_seconds:.0f} events/s where {rate:.0f} were due",
            )


def everyone(server: Server, connections: int, events: int) -> list[dict[str, Any]]:
    """All clients alike, without a cursor."""
    return [{"count": connections, "request": server.request(), "events": events}]


def _paced(
    run: Run, scenario: str, size: tuple[int, float, float], names: list[str] | None = None
) -> None:
    connections, rate, seconds = size
    events = round(rate * seconds)

    def work(server: Server, two: Load, result: Result) -> None:
        fan_out(
            server, two, result, groups=everyone(server, connections, events), events=events,
            rate=rate, patience=run.numbers.patience_seconds,
        )  # fmt: skip

    for name in names or run.everybody(paced=True):
        run.measured(scenario, f"{connections} x {rate:g}/s", name, work)


def _burst(run: Run, scenario: str, size: tuple[int, int], samples: int) -> None:
    connections, events = size

    def work(server: Server, two: Load, result: Result) -> None:
        fan_out(
            server, two, result, groups=everyone(server, connections, events), events=events,
            samples=samples, patience=run.numbers.patience_seconds,
        )  # fmt: skip

    for name in run.everybody():
        run.measured(scenario, f"{connections} connections, {events} events", name, work)


def a(run: Run) -> None:
    """Many connections, many events."""
    _paced(run, "A", run.numbers.a)


def a2(run: Run) -> None:
    """Many connections, few events."""
    _paced(run, "A2", run.numbers.a2)


def b(run: Run) -> None:
    """As fast as possible."""
    # Reading one connection in full costs more than the whole fan-out: few samples.
    _burst(run, "B", run.numbers.b, samples=2)


def c(run: Run) -> None:
    """Idle connections, then some events at once."""
    _burst(run, "C", run.numbers.c, samples=20)


def d(run: Run) -> None:
    """History from cursor 0."""
    for rows in run.numbers.d_rows:
        for readers in run.numbers.d_readers:
            variant = f"{rows} stored, {readers} at once"
            run.measured("D", variant, SERVICE, _history(run, rows, readers), history=rows)
    for name in run.others:
        for rows in run.numbers.d_rows:
            if "history" not in servers.ABILITIES.get(name, ()) or rows > nchan.BUFFER:
                run.left_out("D", name, NO_HISTORY if name != "nchan" else "not in its memory")
                break
            for readers in run.numbers.d_readers:
                variant = f"{rows} stored, {readers} at once"
                run.measured("D", variant, name, _history(run, rows, readers))


def _history(run: Run, rows: int, readers: int) -> Callable[[Server, Load, Result], None]:
    def work(server: Server, two: Load, result: Result) -> None:
        if not isinstance(server, Service):
            two.publisher.ask("target", **server.target)
            two.publisher.ask("burst", first=0, count=rows, batch=server.batch)
        group = {"count": readers, "request": server.from_start(), "events": rows}
        # As fast as half of what one core can copy, and the usual patience on top.
        patience = run.numbers.patience_seconds + rows * readers / 500_000
        read_from(server, two, result, [group], samples=1, patience=patience)

    return work


def read_from(
    server: Server,
    two: Load,
    result: Result,
    groups: list[dict[str, Any]],
    *,
    samples: int,
    patience: float,
) -> dict[str, Any]:
    """Connect clients that have a cursor; from the first connect until all have caught up.

    Returns what the crowd says.
    """
    result.connections = sum(group["count"] for group in groups)
    server.forget_peak()
    before = server.metrics() if isinstance(server, Service) else {}
    meter = Meter(server)
    began_ns = time.monotonic_ns()
    opened = two.crowd.ask(
        "connect", host=servers.HOST, port=server.port, groups=groups, samples=samples,
        seconds=CONNECT_SECONDS,
    )  # fmt: skip
    got = two.crowd.ask("receive", seconds=patience, since_connect=True)
    meter.read(result, got["deliveries"])
    judge(result, got, began_ns)
    # Since they were published, which was long before.
    result.latency_ms = None
    if opened["connected"] < result.connections:
        missing = result.connections - opened["connected"]
        result.problem("falls behind", f"{missing} clients got no stream: {opened['refused']}")
    result.connect_seconds = opened["seconds"]
    # All of it, connecting and catching up.
    result.connect_us = (result.server_cpu_seconds or 0.0) / result.connections * 1e6
    result.peak_mib = server.memory_kib("VmHWM") / 1024
    result.rss_mib = server.memory_kib() / 1024
    if isinstance(server, Service):
        after = server.metrics()
        for name in ("backfill_pages", "backfill_page_hits", "ring_hits"):
            result.more[name.replace("_", " ")] = int(
                after[f"{name}_total"] - before[f"{name}_total"]
            )
    return got


def e(run: Run) -> None:
    """All clients come back at once, each a few hundred events behind."""
    clients, least, most = run.numbers.e
    behind = [least + (most - least) * step // 20 for step in range(20)]

    def work(restart: bool) -> Callable[[Server, Load, Result], None]:
        def back(server: Server, two: Load, result: Result) -> None:
            two.publisher.ask("target", **server.target)
            two.publisher.ask("burst", first=0, count=2 * most, batch=min(20, server.batch))
            ids = server.event_ids(2 * most)
            groups = [
                {
                    "count": (clients + step) // len(behind),
                    "request": server.request(cursor=ids[-missed - 1]),
                    "events": missed,
                }
                for step, missed in enumerate(behind)
            ]
            if isinstance(server, Service):
                if restart:
                    server.stop()
                    server.start()
                _until_head(server, 2 * most)
            patience = run.numbers.patience_seconds
            read_from(server, two, result, groups, samples=20, patience=patience)

        return back

    after_break, after_restart = f"{clients} clients after a break", f"{clients} after a restart"
    run.measured("E", after_break, SERVICE, work(restart=False))
    run.measured("E", after_restart, SERVICE, work(restart=True))
    for name in run.others:
        if "resume" in servers.ABILITIES.get(name, ()):
            run.measured("E", after_break, name, work(restart=False))
        else:
            run.left_out("E", name, NO_HISTORY)


def _until_head(server: Service, head: int) -> None:
    deadline = time.monotonic() + 10
    while server.metrics()["head_seq"] < head and time.monotonic() < deadline:
        time.sleep(0.05)


def f(run: Run) -> None:
    """As A, and half of the clients with filters, each of which lets half of the events through."""
    connections, rate, seconds = run.numbers.f
    events, filters = round(rate * seconds), run.numbers.f_filters
    half = labels.VALUES // 2

    def work(server: Server, two: Load, result: Result) -> None:
        groups = everyone(server, connections // 2, events)
        for number in range(filters):
            wanted = {(number + step) % labels.VALUES for step in range(half)}
            query = "&".join(f"values=value-{each}" for each in sorted(wanted))
            groups.append(
                {
                    "count": connections // 2 // filters,
                    "request": server.request(f"?{query}"),
                    "events": sum(each % labels.VALUES in wanted for each in range(events)),
                    "gaps": True,
                }
            )
        fan_out(
            server, two, result, groups=groups, events=events, rate=rate,
            patience=run.numbers.patience_seconds,
        )  # fmt: skip
        offered = events * result.connections
        result.more["µs per event and connection, hidden ones included"] = round(
            (result.server_cpu_seconds or 0.0) / offered * 1e6, 2
        )

    variant = f"{connections} x {rate:g}/s, {filters} filters"
    run.measured("F", variant, SERVICE, work)
    for name in run.others:
        run.left_out("F", name, "has no filters")


def g(run: Run) -> None:
    """Publishing by POST: labels a second that are accepted, and all delivered to one client."""
    for name in run.everybody():
        if "publishing" not in servers.ABILITIES.get(name, ()):
            run.left_out("G", name, "its publishing is the benchmark's own")
            continue
        for publishers in run.numbers.g_publishers:
            for batch in run.numbers.g_batches:
                variant = f"{publishers} publishers, {batch} labels a POST"
                if name == SERVICE:
                    run.measured("G", variant, name, _accept(run, publishers, batch))
                elif batch == 1:
                    run.measured("G", variant, name, _accept_in_memory(run, publishers))


def _accept(run: Run, publishers: int, batch: int) -> Callable[[Server, Load, Result], None]:
    def work(server: Server, two: Load, result: Result) -> None:
        assert isinstance(server, Service)
        body = json.dumps({"labels": [labels.fields(0, number) for number in range(batch)]})
        answer = _hammered(run, server, result, two, server.publish_head(body), publishers, batch)
        if answer["seqs"] != answer["count"] or server.rows() != answer["count"]:
            result.problem(
                "wrong",
                f"{answer['count']} accepted, {answer['seqs']} seqs, {server.rows()} stored",
            )
        group = {
            "count": 1,
            "request": server.request("?cursor=0"),
            "events": answer["count"],
            "gaps": True,
        }
        two.crowd.ask(
            "connect", host=servers.HOST, port=server.port, groups=[group], samples=0, seconds=10
        )
        got = two.crowd.ask("receive", seconds=run.numbers.patience_seconds)
        result.expected, result.deliveries = got["expected"], got["deliveries"]
        if got["expected"] != got["deliveries"]:
            result.problem("wrong", f"{got['deliveries']} of {got['expected']} were streamed")

    return work


def _accept_in_memory(run: Run, publishers: int) -> Callable[[Server, Load, Result], None]:
    def work(server: Server, two: Load, result: Result) -> None:
        body = labels.data(0, 0)
        request = (
            f"POST {server.target['path']} HTTP/1.1\r\nHost: {servers.HOST}\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        )
        _hammered(run, server, result, two, request, publishers, 1)
        result.more["note"] = "kept in memory, nothing is stored"

    return work


def _hammered(
    run: Run,
    server: Server,
    result: Result,
    two: Load,
    request: str,
    publishers: int,
    batch: int,
) -> dict[str, Any]:
    result.unit = "label"
    result.connections = publishers
    meter = Meter(server)
    answer = two.publisher.ask(
        "hammer", host=servers.HOST, port=server.port, request=request, publishers=publishers,
        batch=batch, seconds=run.numbers.g_seconds,
    )  # fmt: skip
    meter.read(result, answer["count"])
    result.published = answer["count"]
    result.seconds = (answer["ended_ns"] - answer["began_ns"]) / 1e9
    result.rate = answer["count"] / result.seconds
    # From the request to its answer, not to a subscriber.
    result.latency_ms = answer["answer_ms"]
    result.published_by = "POST /labels" if isinstance(server, Service) else server.how
    return answer


def h(run: Run) -> None:
    """Growth: with connections, and with history."""
    rate = run.numbers.h_rate
    events = round(rate * run.numbers.h_seconds)
    for connections in run.numbers.h_connections:
        _paced(run, "H", (connections, rate, run.numbers.h_seconds))
    for rows in run.numbers.h_rows:

        def work(server: Server, two: Load, result: Result, rows: int = rows) -> None:
            started = server.memory_kib() / 1024
            groups = everyone(server, run.numbers.h_connections[0], events)
            # One reads the beginning of the history meanwhile, and leaves before its end.
            stop = min(rows, run.numbers.h_read)
            with load(run.load_core) as reader:
                group = {"count": 1, "request": server.request("?cursor=0"), "events": stop}
                reader.crowd.ask(
                    "connect", host=servers.HOST, port=server.port, groups=[group], samples=0,
                    seconds=10,
                )  # fmt: skip
                read = reader.crowd.ask("receive", seconds=run.numbers.patience_seconds)
            if read["deliveries"] < stop:
                result.problem("falls behind", f"{read['deliveries']} of {stop} were read")
            fan_out(
                server, two, result, groups=groups, events=events, rate=rate,
                patience=run.numbers.patience_seconds, first=rows,
            )  # fmt: skip
            result.more["MiB at start"] = round(started, 1)
            result.more["history"] = rows
            result.peak_mib = server.memory_kib("VmHWM") / 1024

        run.measured("H", f"{rows} stored", SERVICE, work, history=rows)


def n(run: Run) -> None:
    """Neighbours: what a client gets beside greedy readers and queries of another address."""
    numbers = run.numbers
    with run.opened(SERVICE, numbers.n_rows, servers.KEYS) as server:
        assert isinstance(server, Service)
        _until_head(server, numbers.n_rows)
        for turn, strangers in enumerate(numbers.n_strangers):
            result = Result("N", f"beside {strangers} readers, {numbers.n_rows} stored", SERVICE)
            run.results.append(result)
            run.tell(f"N {result.variant}")
            run.worked(server, result, _beside(run, turn, strangers))
        result = Result("N", f"beside {numbers.n_queries} queries", SERVICE)
        run.results.append(result)
        run.tell(f"N {result.variant}")
        run.worked(server, result, _queries(run))
    for name in run.others:
        run.left_out("N", name, "has no filters")


def _beside(run: Run, turn: int, strangers: int) -> Callable[[Server, Load, Result], None]:
    """History, a filtered snapshot and live events; strangers read with filters of nothing."""
    numbers = run.numbers
    connections, rate, seconds = numbers.n_live
    events = round(rate * seconds)

    def one(group: dict[str, Any]) -> dict[str, Any]:
        """One client that reads history, in a process of its own."""
        with load(run.load_core) as reader:
            reader.crowd.ask(
                "connect", host=servers.HOST, port=group.pop("port"), groups=[group], samples=0,
                seconds=CONNECT_SECONDS,
            )  # fmt: skip
            return reader.crowd.ask("receive", seconds=numbers.patience_seconds, since_connect=True)

    def work(server: Server, two: Load, result: Result) -> None:
        # One half begins where everybody does, the other all over the table.
        groups = [
            {
                "count": 1,
                "request": server.request(
                    f"?values=nobody-{each}&cursor={each % 2 * each * numbers.n_rows // strangers}"
                ),
                "events": 0,
                "address": "127.0.0.2",
            }
            for each in range(strangers)
        ]
        with load(run.load_core) as crowd:
            if groups:
                crowd.crowd.ask(
                    "connect", host=servers.HOST, port=server.port, groups=groups, samples=0,
                    seconds=CONNECT_SECONDS,
                )  # fmt: skip
                time.sleep(SETTLE_SECONDS)
            request = server.request(f"?cursor={turn * numbers.n_read}")
            read = one(
                {"count": 1, "request": request, "events": numbers.n_read, "port": server.port}
            )
            if read["deliveries"] < numbers.n_read:
                result.problem("falls behind", f"{read['deliveries']} of {numbers.n_read} read")
            took = max(1e-9, (read["last_ns"] - read["began_ns"]) / 1e9)
            result.more["history events/s"] = round(read["deliveries"] / took)
            request = server.request("?snapshot=active&values=value-7")
            folded = one(
                {
                    "count": 1, "request": request, "events": labels.KEYS // labels.VALUES,
                    "snapshot": True, "port": server.port,
                }
            )  # fmt: skip
            [snapshot] = folded["snapshots"]
            if snapshot["seconds"] is None:
                result.problem("falls behind", "the snapshot was not complete")
            result.more["snapshot s"] = snapshot["seconds"] and round(snapshot["seconds"], 2)
            fan_out(
                server, two, result, groups=everyone(server, connections, events), events=events,
                rate=rate, patience=numbers.patience_seconds,
                first=numbers.n_rows + turn * events,
            )  # fmt: skip

    return work


def _queries(run: Run) -> Callable[[Server, Load, Result], None]:
    """Queries for one URI, beside others that look at all there is."""
    numbers = run.numbers
    path = "/xrpc/com.atproto.label.queryLabels?limit=250&uriPatterns="
    greedy = [
        f"{path}{pattern}&snapshot=active&cursor={each}"
        for each in range(numbers.n_queries // 2)
        for pattern in ("*", quote(labels.URI) + "*")
    ]

    def work(server: Server, two: Load, result: Result) -> None:
        stop = threading.Event()
        answered: list[int] = []

        def ask_on(path: str) -> None:
            while not stop.is_set():
                with contextlib.suppress(OSError, http.client.HTTPException):
                    answered.append(servers.ask(server.port, path, "127.0.0.2", QUERY_SECONDS)[0])

        meter = Meter(server)
        began_ns = time.monotonic_ns()
        asking = [threading.Thread(target=ask_on, args=(each,)) for each in greedy]
        for thread in asking:
            thread.start()
        time.sleep(SETTLE_SECONDS)
        took = []
        for number in range(20):
            began = time.monotonic()
            uri = quote(f"{labels.URI}0.{number}~")
            try:
                status, body = servers.ask(server.port, f"{path}{uri}", None, QUERY_SECONDS)
            except TimeoutError:
                took.append(QUERY_SECONDS * 1000)
                break
            took.append((time.monotonic() - began) * 1000)
            wanted = min(250, numbers.n_rows // labels.KEYS)
            if status != 200:
                result.problem("falls behind", f"a query for one URI was answered by {status}")
            elif len(json.loads(body)["labels"]) != wanted:
                result.problem("wrong", f"not {wanted} labels: {body[:80]!r}")
        stop.set()
        for thread in asking:
            thread.join()
        took.sort()
        result.unit, result.connections = "query", len(greedy)
        result.deliveries = len(answered) + len(took)
        result.seconds = (time.monotonic_ns() - began_ns) / 1e9
        result.rate = result.deliveries / result.seconds
        meter.read(result, result.deliveries)
        result.latency_ms = {
            f"p{share}": measure.percentile(took, share / 100) for share in (50, 95, 99)
        }
        if took[-1] > 1000 * LATE_SECONDS:
            result.problem("falls behind", f"a query for one URI took {took[-1] / 1000:.1f} s")

    return work


def idle(run: Run) -> None:
    """One client on an idle server: how long from publishing to receiving."""
    _paced(run, "L", run.numbers.idle)


def p(run: Run) -> None:
    """The way through nginx, beside the direct one: under load as in A2, and idle."""
    for size in (run.numbers.a2, run.numbers.idle):
        _paced(run, "P", size, [SERVICE, servers.BEHIND_NGINX])


def s(run: Run) -> None:
    """The state instead of events: snapshots of a large table of which a tenth is in force."""
    rows = run.numbers.s_rows
    for kind, told in ((servers.STATE, "stored"), (servers.OZONE, "in Ozone's table")):
        for readers in run.numbers.s_readers:
            variant = f"{rows // 10} in force of {rows} {told}, {readers} at once"
            run.measured(
                "S", variant, SERVICE, _snapshot(run, rows, readers), history=rows, kind=kind
            )
    for name in run.others:
        run.left_out("S", name, "has no snapshots")


def _snapshot(run: Run, rows: int, readers: int) -> Callable[[Server, Load, Result], None]:
    def work(server: Server, two: Load, result: Result) -> None:
        assert isinstance(server, Service)
        _until_head(server, rows)
        started = server.memory_kib() / 1024
        group = {
            "count": readers,
            "request": server.request("?snapshot=active"),
            "events": rows // 10,
            "snapshot": True,
        }
        patience = run.numbers.patience_seconds + rows * readers / 500_000
        got = read_from(server, two, result, [group], samples=0, patience=patience)
        result.more["MiB at start"] = round(started, 1)
        result.more["server s"] = round(result.server_cpu_seconds or 0.0, 2)
        snapshots = got["snapshots"]
        if any(each["seconds"] is None for each in snapshots):
            result.problem("falls behind", "a snapshot was not complete")
            return
        # Until the last was told that it has all, not until its last event.
        result.seconds = max(each["seconds"] for each in snapshots)
        result.rate = result.deliveries / result.seconds
        if {each["until"] for each in snapshots} != {rows}:
            result.problem("wrong", "not all snapshots are as of the newest seq")
        wanted = server.in_force()
        if len(wanted) != rows // 10 or snapshots[0]["seqs"] != measure.digest(wanted):
            result.problem("wrong", "a snapshot is not what is in force by the table")

    return work


SCENARIOS: dict[str, Callable[[Run], None]] = {
    "A": a, "A2": a2, "B": b, "C": c, "D": d, "E": e, "F": f, "G": g, "H": h, "L": idle,
    "N": n, "P": p, "S": s,
}  # fmt: skip
