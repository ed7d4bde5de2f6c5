"""Hadamard matrices from Turyn-type sequences: orders that Paley's constructions and products do not reach.

Four sequences of +1 and -1, X, Y, Z of length n and W of length n - 1, are of Turyn type if their aperiodic autocorrelations satisfy
N_X + N_Y + 2 N_Z + 2 N_W = 0 at every shift. Then (Z; W), (Z; -W), X and Y are base sequences, which give T-sequences of length 3 n - 1,
and the four circulant matrices of their signed sums fill the array of Goethals and Seidel: a Hadamard matrix of order 4 (3 n - 1).
(J. M. Goethals and J. J. Seidel, "Orthogonal matrices with zero diagonal", 1967; R. J. Turyn, "Hadamard matrices, Baumert-Hall units,
four-symbol sequences, pulse compression, and surface wave encodings", 1974.)
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

TURYN_TYPE: dict[int, tuple[str, str, str, str]] = {
    36: (
        "+++----++-+-+-----++++-++-++++----+-",
        "+-+++++--+-+--+--++--++++-++++---++-",
        "+-+++++-+--++++-+++-++--+++-+--+---+",
        "+++-+-----++--+-+++--+-+-+++-++++-+",
    ),
}
"""X, Y, Z, W by n. 36: H. Kharaghani and B. Tayfeh-Rezaie, "A Hadamard matrix of order 428", 2005; found by a long computer search."""


@cache
def turyn_length(order: int) -> int | None:
    """The n of known Turyn-type sequences that give a matrix of this order, or None."""
    n, rest = divmod(order // 4 + 1, 3)
    return n if order % 4 == 0 and rest == 0 and n in TURYN_TYPE else None


def turyn_matrix(n: int) -> NDArray[np.int8]:
    """The Hadamard matrix of order `4 (3 n - 1)` from the Turyn-type sequences of length n."""
    x, y, z, w = (np.array([1 if sign == "+" else -1 for sign in text], dtype=np.int8) for text in TURYN_TYPE[n])
    length = 3 * n - 1
    t = np.zeros((4, length), dtype=np.int8)
    t[0, :n] = z
    t[1, n : 2 * n - 1] = w
    t[2, 2 * n - 1 :] = (x + y) // 2
    t[3, 2 * n - 1 :] = (x - y) // 2
    signs = np.array([[1, 1, 1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1], [-1, 1, -1, 1]], dtype=np.int8)
    a, b, c, d = (_circulant(row) for row in signs @ t)
    # Reversing the columns turns a circulant matrix into a symmetric one, which is what makes the rows of different blocks orthogonal.
    br, cr, dr, bt, ct, dt = (m[:, ::-1] for m in (b, c, d, b.T, c.T, d.T))
    matrix: NDArray[np.int8] = np.block([[a, br, cr, dr], [-br, a, dt, -ct], [-cr, -dt, a, bt], [-dr, ct, -bt, a]])
    return matrix


def _circulant(row: NDArray[np.int8]) -> NDArray[np.int8]:
    """The matrix whose row i is `row`, shifted i places to the right."""
    index = np.arange(len(row))
    shifted: NDArray[np.int8] = row[(index[None] - index[:, None]) % len(row)]
    return shifted
