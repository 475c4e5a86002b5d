"""segmented_topk in position order: 4 B N bytes of scores read, 12 B k of values and indices written."""

OP = "select"


def bench_select(measure, provider, case, threads, cache):
    measure(OP, provider, case, threads, cache)
