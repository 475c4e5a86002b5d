"""compact of the hidden states, indices given: B k D E bytes read and as many written, 8 B k of indices read."""

OP = "compact"


def bench_compact(measure, provider, case, threads, cache):
    measure(OP, provider, case, threads, cache)
