"""`serve --workers N`: one server of several processes.

Promises: N workers serve. A worker that dies or hangs is replaced; only its own clients lose their
connections. When the first process ends, by whatever signal, all workers end. An error from which
no worker could serve (a wrong setting at the start, a broken promise) ends the server with one
sentence, as it ends a single process.

Every worker runs the whole `App`, with a sequencer of its own. The first process owns the embedded
PostgreSQL (`cli`). Workers ask each other questions through `neighbours`.

    supervisor ──stdin: a job, then nothing until it ends──> worker ──> App
               <──stdout: "ready", a "." each second, or why it cannot go on──

Not gunicorn with aiohttp's worker (27.0 and 3.14), for these reasons. That worker accepts with an
aiohttp site of its own, so `web.door` with its limits could not be used without a new `_run`. It
replaces every worker that ended after its start, at once and forever, also after a broken promise.
It forks. SIGHUP makes it load the program again. It reads its settings from a file of its own.
Without these parts only a loop around wait() is left.

All workers accept from one socket. With a socket for each (SO_REUSEPORT) the kernel resets the
connections that wait in the queue of a killed worker (57 of 100 connections, and nobody reports
them), and connections are spread by chance. With one socket the worker that wakes first takes most:
of 1,000 connections in a row four workers got 171, 465, 14 and 350. So the worker with most
connections lets the others accept (`neighbours`). Then 1,000 in a row were spread as 245, 255, 248,
252; 1,000 at once as 252, 244, 252, 252; and the 245 that reconnected after a death left 236, 256,
254, 254.
"""
