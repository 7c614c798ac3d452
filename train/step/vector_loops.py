"""Vector loops for the sparse step: sums of rows, inner products of rows, and 64 comparisons at once.

Numba vectorises a sum only if the compiler may reorder it, and then its order is unknown. These loops are written as
vectors of 64 bytes with fused multiply-adds, which LLVM maps to the instructions of the CPU (AVX-512, AVX2, NEON):
every sum has one order, on every machine and in every process.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# Typed by numba, for float32 and float64 alike.

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BYTES = 64
BITS = 64


class _Loop:
    """The pieces that the loops below are made of: pointers to elements, vector loads and fused multiply-adds."""

    def __init__(self, context: Any, builder: Any, dtype: Any) -> None:
        self.context, self.builder = context, builder
        self.scalar = context.get_value_type(dtype)
        self.lanes = BYTES * 8 // dtype.bitwidth
        self.vector = ir.VectorType(self.scalar, self.lanes)
        self.align = dtype.bitwidth // 8

    def row(self, array: Any, value: Any, index: Any = None) -> tuple[Any, Any]:
        """Pointer to the first element of an array, or of one row of a matrix, and the number of elements."""
        struct = self.context.make_array(array)(self.context, self.builder, value)
        shape = cgutils.unpack_tuple(self.builder, struct.shape)
        pointer = struct.data
        if index is not None:
            pointer = self.builder.gep(pointer, [self.builder.mul(index, shape[1])])
        return pointer, shape[-1]

    def load(self, pointer: Any, at: Any, kind: Any) -> Any:
        place = self.builder.bitcast(self.builder.gep(pointer, [at]), kind.as_pointer())
        return self.builder.load(place, align=self.align)

    def store(self, value: Any, pointer: Any, at: Any) -> None:
        place = self.builder.bitcast(self.builder.gep(pointer, [at]), value.type.as_pointer())
        self.builder.store(value, place, align=self.align)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        kind = a.type
        name = "f32" if self.align == 4 else "f64"
        name = f"llvm.fma.v{self.lanes}{name}" if isinstance(kind, ir.VectorType) else f"llvm.fma.{name}"
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(kind, [kind] * 3), name)
        return self.builder.call(function, [a, b, c])

    def spread(self, value: Any, lanes: int | None = None) -> Any:
        """A scalar in every lane."""
        lanes = lanes or self.lanes
        empty = ir.Constant(ir.VectorType(self.scalar, lanes), ir.Undefined)
        start = self.builder.insert_element(empty, value, ir.IntType(32)(0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
        return self.builder.shuffle_vector(start, start, zeros)

    def total(self, vector: Any) -> Any:
        """The sum of the lanes, halves onto halves."""
        lanes = self.lanes
        while lanes > 1:
            lanes //= 2
            index = ir.VectorType(ir.IntType(32), lanes)
            low, high = (
                self.builder.shuffle_vector(vector, vector, ir.Constant(index, list(range(start, start + lanes))))
                for start in (0, lanes)
            )
            vector = self.builder.fadd(low, high)
        return self.builder.extract_element(vector, ir.IntType(32)(0))

    def each(self, length: Any, body: Any) -> None:
        """Run body(position, kind) over whole vectors, then over the elements left."""
        whole = self.builder.and_(length, ir.Constant(length.type, -self.lanes))
        step = ir.Constant(length.type, self.lanes)
        for start, stop, by, kind in (
            (ir.Constant(length.type, 0), whole, step, self.vector),
            (whole, length, ir.Constant(length.type, 1), self.scalar),
        ):
            with cgutils.for_range_slice(self.builder, start, stop, by, length.type) as (at, _):
                body(at, kind)


@intrinsic
def dots(typingctx, left, rows, a, b, c, d):
    """Inner products of left (n) with rows a, b, c and d of a matrix (., n)."""
    signature = types.UniTuple(rows.dtype, 4)(left, rows, types.intp, types.intp, types.intp, types.intp)
    return signature, lambda context, builder, sig, args: _products(context, builder, sig, args)


@intrinsic
def dot(typingctx, left, rows, a):
    """Inner product of left (n) with row a of a matrix (., n)."""
    return rows.dtype(left, rows, types.intp), lambda context, builder, sig, args: _products(
        context, builder, sig, args
    )


def _products(context, builder, sig, args):
    loop = _Loop(context, builder, sig.args[1].dtype)
    left, length = loop.row(sig.args[0], args[0])
    rows = [loop.row(sig.args[1], args[1], index)[0] for index in args[2:]]
    parts = [cgutils.alloca_once_value(builder, ir.Constant(loop.vector, None)) for _ in rows]
    rests = [cgutils.alloca_once_value(builder, ir.Constant(loop.scalar, 0.0)) for _ in rows]

    def body(at, kind):
        value = loop.load(left, at, kind)
        for row, sums in zip(rows, parts if kind is loop.vector else rests, strict=True):
            builder.store(loop.fma(loop.load(row, at, kind), value, builder.load(sums)), sums)

    for sums in parts:
        builder.store(loop.spread(ir.Constant(loop.scalar, 0.0)), sums)
    for sums in rests:
        builder.store(ir.Constant(loop.scalar, 0.0), sums)
    loop.each(length, body)
    values = [
        builder.fadd(loop.total(builder.load(part)), builder.load(rest))
        for part, rest in zip(parts, rests, strict=True)
    ]
    if len(values) == 1:
        return values[0]
    return context.make_tuple(builder, sig.return_type, values)


@intrinsic
def add_rows(typingctx, sums, rows, a, b, c, d, fa, fb, fc, fd):
    """Add rows a, b, c and d of a matrix (., n), each times its factor, to sums (n)."""
    one = rows.dtype
    signature = types.void(sums, rows, types.intp, types.intp, types.intp, types.intp, one, one, one, one)
    return signature, lambda context, builder, sig, args: _add(context, builder, sig, args, 4)


@intrinsic
def add_row(typingctx, sums, rows, a, fa):
    """Add row a of a matrix (., n), times its factor, to sums (n)."""
    signature = types.void(sums, rows, types.intp, rows.dtype)
    return signature, lambda context, builder, sig, args: _add(context, builder, sig, args, 1)


def _add(context, builder, sig, args, count):
    loop = _Loop(context, builder, sig.args[1].dtype)
    sums, length = loop.row(sig.args[0], args[0])
    rows = [loop.row(sig.args[1], args[1], index)[0] for index in args[2 : 2 + count]]
    factors = args[2 + count :]
    spread = [loop.spread(factor) for factor in factors]

    def body(at, kind):
        total = loop.load(sums, at, kind)
        for row, factor in zip(rows, spread if kind is loop.vector else factors, strict=True):
            total = loop.fma(loop.load(row, at, kind), factor, total)
        loop.store(total, sums, at)

    loop.each(length, body)
    return context.get_dummy_value()


@intrinsic
def above(typingctx, values, row, biases, start):
    """Bits of which of 64 values of a matrix's row, from `start` on, are above minus their bias (n), or NaN."""
    return types.uint64(values, types.intp, biases, types.intp), _above


def _above(context, builder, sig, args):
    loop = _Loop(context, builder, sig.args[0].dtype)
    kind = ir.VectorType(loop.scalar, BITS)
    row, _ = loop.row(sig.args[0], args[0], args[1])
    biases, _ = loop.row(sig.args[2], args[2])
    raised = builder.fadd(loop.load(row, args[3], kind), loop.load(biases, args[3], kind))
    zeros = ir.Constant(kind, [0.0] * BITS)
    return builder.bitcast(builder.fcmp_unordered(">", raised, zeros), ir.IntType(64))


@intrinsic
def lowest(typingctx, bits):
    """Place of the lowest bit that is set."""

    def code(context, builder, sig, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.intp(types.uint64), code


@intrinsic
def count_bits(typingctx, bits):
    """How many bits are set."""
    return types.intp(types.uint64), lambda context, builder, sig, args: builder.ctpop(args[0])


@intrinsic
def maybe_above(typingctx, values, row, biases, by_norm, by_rest, start, norm, rest, share):
    """As `above` for values in bfloat16's bits that are off by at most

    share * |value| + norm * by_norm (n) + rest * by_rest (n): bits of those that may be above minus their bias.
    """
    one = biases.dtype
    return types.uint64(values, types.intp, biases, by_norm, by_rest, types.intp, one, one, one), _maybe_above


def _maybe_above(context, builder, sig, args):
    loop = _Loop(context, builder, sig.args[2].dtype)
    kind, words = ir.VectorType(loop.scalar, BITS), ir.VectorType(ir.IntType(32), BITS)
    row, _ = loop.row(sig.args[0], args[0], args[1])
    place = builder.bitcast(builder.gep(row, [args[5]]), ir.VectorType(ir.IntType(16), BITS).as_pointer())
    bits = builder.zext(builder.load(place, align=2), words)
    value = builder.bitcast(builder.shl(bits, ir.Constant(words, [16] * BITS)), kind)
    size = builder.bitcast(builder.and_(builder.bitcast(value, words), ir.Constant(words, [0x7FFFFFFF] * BITS)), kind)
    total = value
    loaded = [loop.load(loop.row(sig.args[at], args[at])[0], args[5], kind) for at in (2, 3, 4)]
    norm, rest, share = (loop.spread(args[at], BITS) for at in (6, 7, 8))
    for factor, term in ((share, size), (norm, loaded[1]), (rest, loaded[2])):
        total = builder.fadd(total, builder.fmul(factor, term))
    total = builder.fadd(total, loaded[0])
    return builder.bitcast(builder.fcmp_unordered(">", total, ir.Constant(kind, [0.0] * BITS)), ir.IntType(64))
