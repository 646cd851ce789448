"""Derives the constants of csrc/cpu/math.h. Run: python csrc/tools/derive_gelu.py (needs mpmath).

Remez exchange on  max_u weight(u) |f(u) - poly(u)|  over an interval, in 60-digit arithmetic; the coefficients
are then rounded to fp32. tests in csrc/tests check the resulting functions, not these numbers.

TAIL: Phi(-u) exp(u^2 / 2) on [0, 6], weight exp(-u^2 / 2): the error that reaches Phi.  Phi(-6) = 1e-9 is below
the bound on GELU (4 * 2^-24 * |x|), so the kernels take Phi = 0 beyond 6.
EXP2: 2^f on [-1/2, 1/2], weight 2^-f: the relative error.
"""

from collections.abc import Callable

import mpmath

mpmath.mp.dps = 60
Function = Callable[[mpmath.mpf], mpmath.mpf]


def remez(target: Function, weight: Function, low: float, high: float, degree: int) -> tuple[list[float], float]:
    """Returns (fp32-rounded coefficients, lowest power first; largest weighted error of the exact ones)."""
    middle, half = mpmath.mpf(low + high) / 2, mpmath.mpf(high - low) / 2
    count = degree + 2
    points = [middle - half * mpmath.cos(mpmath.pi * i / (count - 1)) for i in range(count)]
    grid = [middle - half * mpmath.cos(mpmath.pi * i / 3000) for i in range(3001)]
    wanted = [(u, target(u), weight(u)) for u in grid]
    for _ in range(20):
        rows = [[u**p for p in range(degree + 1)] + [(-1) ** i / weight(u)] for i, u in enumerate(points)]
        solution = mpmath.lu_solve(mpmath.matrix(rows), mpmath.matrix([target(u) for u in points]))
        coefficients = [solution[p] for p in range(degree + 1)]
        errors = [scale * (value - mpmath.polyval(coefficients[::-1], u)) for u, value, scale in wanted]
        peaks: list[int] = []  # one extremum per run of equal sign
        for index, error in enumerate(errors):
            if peaks and (errors[peaks[-1]] > 0) == (error > 0):
                if abs(error) > abs(errors[peaks[-1]]):
                    peaks[-1] = index
            else:
                peaks.append(index)
        if len(peaks) != count:
            break
        points = [grid[index] for index in peaks]
    return [float(mpmath.mpf(c)) for c in coefficients], float(max(abs(e) for e in errors))


def show(name: str, coefficients: list[float], error: float) -> None:
    print(f"{name}: error {error:.2e} = {error * 2**24:.3f} * 2^-24")
    print("  " + ", ".join(f"{c:.9g}f" for c in coefficients))


if __name__ == "__main__":
    for degree in (8, 9, 10):
        show(
            f"TAIL degree {degree}",
            *remez(lambda u: mpmath.ncdf(-u) * mpmath.exp(u * u / 2), lambda u: mpmath.exp(-u * u / 2), 0, 6, degree),
        )
    show("EXP2 degree 6", *remez(lambda f: mpmath.power(2, f), lambda f: mpmath.power(2, -f), -0.5, 0.5, 6))
