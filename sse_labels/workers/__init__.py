"""`serve --workers N`: one server of several processes.

Promises: there are N that serve; one that dies or hangs is replaced, and costs nobody but its own
clients; whatever ends the first process, by whatever signal, ends them all; what none of
them could serve from (a wrong setting at the start, a broken promise) ends the server as it
ends one process, with one sentence.
Stands above `app`, which every worker runs whole: each has its own sequencer.
Does not belong here: the database's server, which the first process owns (`cli`); what
the workers ask each other (`neighbours`).

    supervisor ──stdin: a job, then nothing until it ends──> worker ──> App
               <──stdout: "ready", a "." each second, or why it cannot go on──

Own code, not gunicorn with aiohttp's worker (27.0 and 3.14). That worker accepts by an
aiohttp site of its own, so our door (`web.guard`), and with it the limits, would have no
place, unless its `_run` were written anew. It replaces whatever ended after it had booted,
at once and for ever, with a broken promise as with a crash. It forks, takes SIGHUP for
"load anew" and its settings from a file of its own. What is left is a loop around wait().

All accept from one socket. With one for each (SO_REUSEPORT) the kernel resets what waits
in the queue of a worker that is killed (57 of 100 connections, of which nobody knows),
and spreads by chance; from one socket alone, whoever wakes first takes most: of 1,000
connections in a row four workers got 171, 465, 14 and 350. So the one that is ahead lets
the others accept (`neighbours`): 1,000 in a row became 245, 255, 248, 252, at once 252, 244,
252, 252, and the 245 that came back after a death 236, 256, 254, 254.
"""
