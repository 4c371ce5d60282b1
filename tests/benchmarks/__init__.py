"""The benchmarks: the service beside its peers, on the same work, in the same run.

    make bench                                  everything; takes a long while
    make bench ONLY="A B" PEERS="nchan"         two scenarios, one peer
    make bench SIZE=small                       a few seconds each, to try it

What is compared: CPU time of the server per delivery, read from /proc. It survives a noisy
machine; rates and latencies do so less. Servers run on one core, the load on another.

    __main__    which scenarios, which servers; in which order; where the results go
    scenarios   what each scenario does and what it must deliver; the numbers of both sizes
    servers     how each server is started: the service whole, and its peers (peer_*.py, nchan.py)
    load        the subscribers: one process, many connections, counts all and parses a few
    publish     the publishers: one process, by SQL, by POST
    worker      how load and publish are told what to do: lines of JSON
    measure     CPU and memory of processes, percentiles
    cores       which process may run where, how many files may be open
    labels      the label that is sent
    report      the table and the JSON;  plots: the figures

Nothing in here is a test, and no test looks at a time.
"""
