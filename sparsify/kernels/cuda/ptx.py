"""The instructions that Triton has no name for, as inline PTX on whole warps or single registers.

All tensors have 32 elements a warp, one a lane, so that an operand is one register. What works on
both halves of a register takes IS_HALF: float16 instead of bfloat16.
"""

from __future__ import annotations

from sparsify.kernels.triton_jit import jit, tl


@jit
def fence() -> tl.tensor:
    """Keeps the loads above it in flight together: the compiler would sink each to its use."""
    return tl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@jit
def start_next() -> tl.tensor:
    """Lets the next kernel start when all programs of this one have: it waits for what it needs."""
    return tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@jit
def wait_for_inputs() -> tl.tensor:
    """What earlier kernels wrote can be read from here on; at once where they have ended."""
    return tl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


def sparse_product_ptx(selector: int, is_half: bool) -> str:
    """`sparse_product` of the tile that the selector names, for bfloat16 or float16."""
    kind = "f16" if is_half else "bf16"
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9,$10,$11}, {$12,$13,$14,$15}, "
        f"$16, 0x{selector};"
    )


@jit
def sparse_product(
    a: tl.tuple, b: tl.tuple, c: tl.tuple, positions: tl.tensor, PTX: tl.constexpr
) -> tl.tuple:
    """c + A B of a warp: A 16 x 32 of which half is stored, B 32 x 8, sums float32.

    Args:
        a: four registers, two survivors each.
        b: four registers, two inputs each.
        c: four registers.
        positions: of a word's two tiles.
        PTX: of `sparse_product_ptx`.
    """
    return tl.inline_asm_elementwise(
        PTX, "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r",
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], positions],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
    )  # fmt: skip


@jit
def minus(a: tl.tensor, b: tl.tensor, IS_HALF: tl.constexpr) -> tl.tensor:
    """a - b of both halves. For bfloat16 as a product with -1, which compute capability 8.0 has."""
    if IS_HALF:
        return tl.inline_asm_elementwise(
            "sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    return tl.inline_asm_elementwise(
        "{.reg .b32 m; mov.b32 m, 0xbf80bf80; fma.rn.bf16x2 $0, $2, m, $1;}",
        "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@jit
def times_power(a: tl.tensor, IS_HALF: tl.constexpr) -> tl.tensor:
    """Both halves times 2^120, or 2^8 of float16: from float8's exponent, in place, to theirs."""
    if IS_HALF:
        return tl.inline_asm_elementwise(
            "{.reg .b32 m; mov.b32 m, 0x5c005c00; mul.rn.f16x2 $0, $1, m;}",
            "=r,r", [a], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        "{.reg .b32 m, z; mov.b32 m, 0x7b807b80; mov.b32 z, 0x80008000; "
        "fma.rn.bf16x2 $0, $1, m, z;}",
        "=r,r", [a], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@jit
def and_or(a: tl.tensor, AND: tl.constexpr, OR: tl.constexpr) -> tl.tensor:
    """(a & AND) | OR in one instruction: of two constants the compiler makes two."""
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xea;",
        "=r,r,r,r", [a, AND, OR], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@jit
def pick(a: tl.tensor, b: tl.tensor, selector: tl.tensor) -> tl.tensor:
    """Four of the eight bytes of a (0 to 3) and b (4 to 7), by the selector's four low nibbles."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip
