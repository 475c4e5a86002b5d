"""variation_score: 2 B N D E bytes read, 4 B N written (E bytes per element)."""

OP = "score"


def bench_score(measure, provider, case, threads, cache):
    measure(OP, provider, case, threads, cache)
