"""drop_tokens, the whole step: 2 B N D E bytes read, B k D E read again and written, 8 B k of indices written."""

OP = "drop"


def bench_drop(measure, provider, case, threads, cache):
    measure(OP, provider, case, threads, cache)
