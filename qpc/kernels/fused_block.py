"""A block of codes times a column block of the operand, on one warp: what `qpc.kernels.fused_hopper` repeats."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, misc, var-annotated"

from triton.experimental import gluon  # type: ignore[import-untyped]
from triton.experimental.gluon import language as gl  # type: ignore[import-untyped]

from qpc.kernels.fused_ptx import multiply, multiply_constraints, types
from qpc.kernels.warpgroup import WAIT_FOR_PRODUCTS, issue, issue_constraints, wait_constraints
from qpc.quant.codebook import MULTIPLIERS, START, hash_words

_START, _MULTIPLIERS = gl.constexpr(START), gl.constexpr(MULTIPLIERS)
_multiply, _multiply_constraints = gluon.constexpr_function(multiply), gluon.constexpr_function(multiply_constraints)
_issue, _issue_constraints = gluon.constexpr_function(issue), gluon.constexpr_function(issue_constraints)
_wait_constraints, _WAIT_FOR_PRODUCTS = gluon.constexpr_function(wait_constraints), gl.constexpr(WAIT_FOR_PRODUCTS)
_types, _hash_words = gluon.constexpr_function(types), gluon.constexpr_function(hash_words)


@gluon.jit
def do(TEXT: gl.constexpr, CONSTRAINTS: gl.constexpr, arguments):
    """Run instructions for their effect; `$0` is a result that nobody reads."""
    return gl.inline_asm_elementwise(TEXT, CONSTRAINTS, arguments, dtype=gl.uint32, is_pure=False, pack=1)


@gluon.jit
def _load_words(at, COUNT: gl.constexpr):
    """COUNT neighbouring words (1, 2 or 4) of shared memory from byte address `at`, a tuple of uint32."""
    if COUNT == 4:
        words = gl.inline_asm_elementwise(
            "ld.shared.v4.b32 {$0,$1,$2,$3}, [$4];", "=r,=r,=r,=r,r", [at], _types(4, True), is_pure=False, pack=1
        )
    elif COUNT == 2:
        words = gl.inline_asm_elementwise("ld.shared.v2.b32 {$0,$1}, [$2];", "=r,=r,r", [at], _types(2, True), is_pure=False, pack=1)
    else:
        words = (gl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [at], gl.uint32, is_pure=False, pack=1),)
    return words


@gluon.jit
def load_arc(own, far, STEP_BITS: gl.constexpr):
    """The words that hold a lane's 16 windows, from the byte addresses of its first word and of the word after its last."""
    COUNT: gl.constexpr = (STEP_BITS + 1) // 2
    WIDTH: gl.constexpr = 4 if STEP_BITS % 8 == 0 else 2 if STEP_BITS % 4 == 0 else 1
    words = ()
    for start in gl.static_range(0, COUNT, WIDTH):
        words += _load_words(own + 4 * start, WIDTH)
    return words + _load_words(far, 1)


@gluon.jit
def _funnel(low, high, offset):
    """The 32 bits from bit `offset` (uint32, below 32) of `low` on into `high`."""
    return gl.inline_asm_elementwise("shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, offset], gl.uint32, is_pure=True, pack=1)


@gluon.jit
def aligned(words, shift, STEP_BITS: gl.constexpr):
    """The words so that the first window begins at bit 0: with an odd step every other lane begins in the middle of a word."""
    made = words
    if STEP_BITS % 2:
        made = ()
        for index in gl.static_range((STEP_BITS + 1) // 2):
            made += (_funnel(words[index], words[index + 1], shift),)
        made += (words[(STEP_BITS + 1) // 2] >> shift,)
    return made


@gluon.jit
def _hash(words, STEP_BITS: gl.constexpr, WINDOW_BITS: gl.constexpr, STEP: gl.constexpr):
    """The words of the window of one of the 16 steps, a tuple of uint32."""
    FIRST: gl.constexpr = STEP * STEP_BITS // 32
    OFFSET: gl.constexpr = STEP * STEP_BITS % 32
    word = words[FIRST]
    if OFFSET + WINDOW_BITS > 32:
        word = _funnel(word, words[FIRST + 1], gl.full_like(word, OFFSET))
    elif OFFSET > 0:
        word = word >> OFFSET
    word = gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,n,n", [word, (1 << WINDOW_BITS) - 1, _START], gl.uint32, is_pure=True, pack=1
    )
    hashed = ()
    for index in gl.static_range(_hash_words(STEP_BITS, WINDOW_BITS)):
        hashed += (word * _MULTIPLIERS[index],)
    return hashed


@gluon.jit
def add_block(sums, words, operand, STEP_BITS: gl.constexpr, WINDOW_BITS: gl.constexpr, TILES: gl.constexpr):
    """The sums, four for each 16 rows and TILE of the batch, plus the products of one block with the operand at a byte address."""
    WORDS: gl.constexpr = _hash_words(STEP_BITS, WINDOW_BITS)
    TEXT: gl.constexpr = _multiply(TILES, WORDS)
    CONSTRAINTS: gl.constexpr = _multiply_constraints(TILES, WORDS)
    activation = ()
    for tile in gl.static_range(TILES):
        activation += _load_words(operand + 512 * tile, 2 * WORDS)
    made = ()
    for quarter in gl.static_range(4):
        each = ()
        for step in gl.static_range(4 * quarter, 4 * quarter + 4):
            each += (_hash(words, STEP_BITS, WINDOW_BITS, step),)
        registers = ()
        for index in gl.static_range(4 * TILES):
            registers += (sums[4 * TILES * quarter + index],)
        for index in gl.static_range(WORDS):
            registers += (each[0][index], each[1][index], each[2][index], each[3][index])
        made += gl.inline_asm_elementwise(TEXT, CONSTRAINTS, registers + activation, _types(4 * TILES), is_pure=True, pack=1)
    return made


@gluon.jit
def _issue_half(registers, TILES: gl.constexpr, WORDS: gl.constexpr, HALF: gl.constexpr):
    """The sums; registers: as `qpc.kernels.warpgroup.issue` takes them."""
    TEXT: gl.constexpr = _issue(TILES, WORDS, HALF)
    CONSTRAINTS: gl.constexpr = _issue_constraints(TILES, WORDS)
    return gl.inline_asm_elementwise(TEXT, CONSTRAINTS, registers, _types(16 * TILES), is_pure=False, pack=1)


@gluon.jit
def issue_block(
    sums, words, operand, STEP_BITS: gl.constexpr, WINDOW_BITS: gl.constexpr, TILES: gl.constexpr, OPERAND_ROWS: gl.constexpr
):  # fmt: skip
    """The same by `qpc.kernels.warpgroup`, operand a descriptor. The products of the second half are under way at the end."""
    WORDS: gl.constexpr = _hash_words(STEP_BITS, WINDOW_BITS)
    described = (operand,)
    if WORDS == 2:
        described += (operand + 4 * OPERAND_ROWS,)
    for half in gl.static_range(2):
        hashed = ()
        for quarter in gl.static_range(2 * half, 2 * half + 2):
            each = ()
            for step in gl.static_range(4 * quarter, 4 * quarter + 4):
                each += (_hash(words, STEP_BITS, WINDOW_BITS, step),)
            for index in gl.static_range(WORDS):
                hashed += (each[0][index], each[1][index], each[2][index], each[3][index])
        sums = _issue_half(sums + hashed + described, TILES, WORDS, half)
    return sums


@gluon.jit
def wait_for_products(sums, TILES: gl.constexpr):
    """The sums, after all products that `issue_block` began."""
    return gl.inline_asm_elementwise(_WAIT_FOR_PRODUCTS, _wait_constraints(TILES), sums, _types(16 * TILES), is_pure=False, pack=1)
