"""Whole numbers that divide sizes, for methods that cut layers into blocks or tensors."""

from __future__ import annotations

import math


def divisors(*sizes: int) -> list[int]:
    """What divides all of these, ascending."""
    most = math.gcd(*sizes)
    small = [d for d in range(1, math.isqrt(most) + 1) if most % d == 0]
    return sorted({*small, *(most // d for d in small)})


def nearest_divisors(value: float, *sizes: int) -> str:
    """The nearest divisor of all sizes below and above a value, in words for a refusal: "8 or 12"."""
    found = divisors(*sizes)
    below, above = [d for d in found if d <= value], [d for d in found if d > value]
    return " or ".join(str(d) for d in (*below[-1:], *above[:1]))


def primes(n: int) -> list[int]:
    """The prime factors, ascending, with repeats; [] for 1."""
    found, p = [], 2
    while n > 1:
        if p * p > n:
            p = n
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return found


def balanced(n: int, count: int) -> tuple[int, ...]:
    """`count` whole factors of n, as equal as its primes allow, ascending; ones where it has too few primes."""
    factors = [1] * count
    for prime in reversed(primes(n)):
        factors.sort()
        factors[0] *= prime
    return tuple(sorted(factors))
