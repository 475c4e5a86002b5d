"""What the assembler of NVIDIA made of a kernel, read from its listing."""

from __future__ import annotations

import re

WAIT = "ACQBULK"  # griddepcontrol.wait
# Accesses to global memory, and generic ones, which may be global. Kernel arguments are LDC, shared memory LDS and STS.
_GLOBAL = r"\b((?:LDG|LD|STG|ST|ATOMG|ATOM|RED|REDG|UBLKCP|LDGSTS|CCTL)\b\S*)"


def accesses_before_wait(sass: str) -> list[str] | None:
    """The accesses to global memory before the kernel waits for its predecessor; None for a kernel that does not wait."""
    before, wait, _ = sass.partition(WAIT)
    return re.findall(_GLOBAL, before) if wait else None
