"""Sixteen float32 lanes as one Numba value: arithmetic, loads and stores.

Numba vectorises a loop only if LLVM can prove that no arrays overlap, and then with a check before every inner loop:
a scan of (8, 197, 768, 16) took 5.4 ms in that form and takes 3.2 in this one. LLVM's vector types need no such proof
and compile for any target: AVX-512 in one register, AVX2 in two, NEON in four.
"""

from __future__ import annotations

import operator

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.extending import intrinsic, models, overload, register_model

LANES = 16
FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, FLOATS)


def _splat(builder, scalar):
    lanes = ir.VectorType(scalar.type, LANES)
    first = builder.insert_element(ir.Constant(lanes, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, first, ir.Constant(_INTS, [0] * LANES))


def _ints(value: int):
    return ir.Constant(_INTS, [value] * LANES)


def _widened(context, builder, value, type_):
    """Return `value` as a vector; a number is broadcast to every lane."""
    return value if type_ is vector else _splat(builder, context.cast(builder, value, type_, types.float32))


def _operator(symbol, instruction: str) -> None:
    """Overload `symbol` in Numba for two vectors, or a vector and a number."""

    @intrinsic
    def apply(typing_context, a, b):
        def code(context, builder, signature, values):
            a, b = (_widened(context, builder, v, t) for v, t in zip(values, signature.args, strict=True))
            # LLVM may fuse a product and a following sum on machines with fused multiply-add.
            return getattr(builder, instruction)(a, b, flags=("contract",))

        return vector(a, b), code

    @overload(symbol)
    def typed(a, b):
        if vector in (a, b):
            return lambda a, b: apply(a, b)
        return None


for _symbol, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _operator(_symbol, _instruction)


@intrinsic
def splat(typing_context, number):
    """Return the vector with `number` in every lane."""

    def code(context, builder, signature, values):
        return _widened(context, builder, values[0], signature.args[0])

    return vector(number), code


def _limiter(beyond: str):
    """Return a function of a vector and a number that sets lanes `beyond` the number to it; NaN stays NaN."""

    @intrinsic
    def limited(typing_context, v, limit):
        def code(context, builder, signature, values):
            v, limit = (_widened(context, builder, x, t) for x, t in zip(values, signature.args, strict=True))
            return builder.select(builder.fcmp_ordered(beyond, v, limit), limit, v)

        return vector(v, limit), code

    return limited


minimum, maximum = _limiter(">"), _limiter("<")


@intrinsic
def minus_magnitude(typing_context, v):
    """Return -|v|."""

    def code(context, builder, signature, values):
        bits = builder.or_(builder.bitcast(values[0], _INTS), _ints(-(2**31)))
        return builder.bitcast(bits, FLOATS)

    return vector(v), code


@intrinsic
def add_exponent(typing_context, p, exponent):
    """Return p 2^n, n the low byte of `exponent`; adding n to p's exponent is cheaper than a multiplication."""

    def code(context, builder, signature, values):
        p, exponent = (builder.bitcast(v, _INTS) for v in values)
        return builder.bitcast(builder.add(p, builder.shl(exponent, _ints(23))), FLOATS)

    return vector(p, exponent), code


@intrinsic
def lane_sum(typing_context, v):
    """Return the sum of all lanes, halves first: the order is the same on every machine."""

    def code(context, builder, signature, values):
        v, width = values[0], LANES
        while width > 1:
            width //= 2
            low, high = (
                ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(first, first + width)))
                for first in (0, width)
            )
            v = builder.fadd(builder.shuffle_vector(v, v, low), builder.shuffle_vector(v, v, high))
        return builder.extract_element(v, ir.Constant(ir.IntType(32), 0))

    return types.float32(v), code


def _pointer(context, builder, array_type, array, index):
    """Return the address of an element, without a bounds check; indices are never negative here."""
    a = context.make_array(array_type)(context, builder, array)
    shape, strides = (cgutils.unpack_tuple(builder, v) for v in (a.shape, a.strides))
    indices = cgutils.unpack_tuple(builder, index)
    return cgutils.get_item_pointer2(
        context, builder, a.data, shape, strides, array_type.layout, indices, wraparound=False
    )


def _copied(builder, to, source, count, item_type) -> None:
    size = ir.Constant(ir.IntType(64), item_type.width // 8 if isinstance(item_type, ir.IntType) else 4)
    cgutils.raw_memcpy(builder, to, source, count, size)


@intrinsic
def load(typing_context, array, index, count):
    """Load `count` lanes from `array` at `index` (a tuple of unsigned integers) along its last, dense axis, then zeros.

    The array holds float32, or bfloat16 as uint16.
    """

    def code(context, builder, signature, values):
        half = signature.args[0].dtype != types.float32
        item = ir.IntType(16) if half else ir.FloatType()
        lanes = ir.VectorType(item, LANES)
        source = _pointer(context, builder, signature.args[0], values[0], values[1])
        part = cgutils.alloca_once(builder, lanes)
        whole = builder.icmp_unsigned("==", values[2], values[2].type(LANES))
        with builder.if_else(whole, likely=True) as (then, otherwise):
            with then:
                fast = builder.load(builder.bitcast(source, lanes.as_pointer()), align=2 if half else 4)
                fast_end = builder.basic_block
            with otherwise:
                builder.store(ir.Constant(lanes, [0] * LANES), part)
                _copied(builder, part, source, values[2], item)
                slow = builder.load(part)
                slow_end = builder.basic_block
        loaded = builder.phi(lanes)
        loaded.add_incoming(fast, fast_end)
        loaded.add_incoming(slow, slow_end)
        if half:
            loaded = builder.bitcast(builder.shl(builder.zext(loaded, _INTS), _ints(16)), FLOATS)
        return loaded

    return vector(array, index, count), code


@intrinsic
def number(typing_context, array, index):
    """Return the float32 value of one element of `array`, which holds float32, or bfloat16 as uint16."""

    def code(context, builder, signature, values):
        found = builder.load(_pointer(context, builder, signature.args[0], values[0], values[1]))
        if signature.args[0].dtype == types.float32:
            return found
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(found, word), word(16)), ir.FloatType())

    return types.float32(array, index), code


@intrinsic
def prefetch(typing_context, array, index):
    """Prefetch the cache line of an element that will be loaded soon; the index may lie outside the array."""

    def code(context, builder, signature, values):
        bytes_ = ir.IntType(8).as_pointer()
        pointer = builder.bitcast(_pointer(context, builder, signature.args[0], values[0], values[1]), bytes_)
        flag = ir.IntType(32)
        function_type = ir.FunctionType(ir.VoidType(), [bytes_, flag, flag, flag])
        function = builder.module.declare_intrinsic("llvm.prefetch", [bytes_], function_type)
        builder.call(function, [pointer, flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(array, index), code


@intrinsic
def store(typing_context, array, index, count, v):
    """Store the first `count` lanes of `v` into `array` at `index`; the counterpart of `load`."""

    def code(context, builder, signature, values):
        half = signature.args[0].dtype != types.float32
        item = ir.IntType(16) if half else ir.FloatType()
        lanes = ir.VectorType(item, LANES)
        target = _pointer(context, builder, signature.args[0], values[0], values[1])
        v = _rounded_to_bfloat16(builder, values[3]) if half else values[3]
        part = cgutils.alloca_once(builder, lanes)
        whole = builder.icmp_unsigned("==", values[2], values[2].type(LANES))
        with builder.if_else(whole, likely=True) as (then, otherwise):
            with then:
                builder.store(v, builder.bitcast(target, lanes.as_pointer()), align=2 if half else 4)
            with otherwise:
                builder.store(v, part)
                _copied(builder, target, part, values[2], item)
        return context.get_dummy_value()

    return types.void(array, index, count, v), code


def _rounded_to_bfloat16(builder, v):
    """Return the upper halves of the lanes, rounded to nearest, ties to even; NaN stays NaN."""
    bits = builder.bitcast(v, _INTS)
    odd = builder.and_(builder.lshr(bits, _ints(16)), _ints(1))
    rounded = builder.add(bits, builder.add(odd, _ints(0x7FFF)))
    quiet = builder.or_(bits, _ints(1 << 22))
    bits = builder.select(builder.fcmp_unordered("uno", v, v), quiet, rounded)
    return builder.trunc(builder.lshr(bits, _ints(16)), ir.VectorType(ir.IntType(16), LANES))


# Decorators of the kernels and of the functions that they call with arrays: numpy's division rules, which raise no
# exception, and no reference counting of arrays in such calls, which took half of the time.
kernel = njit(error_model="numpy")
helper = njit(error_model="numpy", _nrt=False)


@njit
def scratch(rows):
    """Allocate uninitialised (rows, 16) float32, one cache line per row: rows across two took 1.5 times as long."""
    flat = np.empty((rows + 1) * LANES, np.float32)
    skip = (-flat.ctypes.data % (4 * LANES)) // 4
    return flat[skip : skip + rows * LANES].reshape(rows, LANES)
