"""The kernels behind gpu_constants.py; a module of their own, because Triton need not be installed."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def small(y, x, EDGE: tl.constexpr):
    """One block that adds 1 to 128 floats; EDGE: it starts while its predecessor still runs, and waits for it."""
    if EDGE:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.arange(0, 128)
    tl.store(y + at, tl.load(x + at) + 1.0)


@triton.jit(do_not_specialize=["programs"])
def barriers(counter, programs, ROUNDS: tl.constexpr):
    """ROUNDS times: wait until all programs have arrived. They must all be resident."""
    for i in tl.static_range(ROUNDS):
        tl.debug_barrier()
        arrived = tl.atomic_add(counter, 1, sem="acq_rel")
        while arrived < programs * (i + 1) - 1:
            arrived = tl.atomic_add(counter, 0, sem="acquire") - 1
        tl.debug_barrier()
