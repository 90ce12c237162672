"""Sixteen float32 lanes as one Numba value: arithmetic, loads, stores, exp2, sigmoid and softplus.

Numba vectorises a loop only if LLVM can prove that no arrays overlap, and then with a check before every inner loop:
a scan of (8, 197, 768, 16) took 5.4 ms in that form and takes 3.2 in this one. LLVM's vector types need no such proof
and run on any target: AVX-512 in one register, AVX2 in two, NEON in four.
"""

from __future__ import annotations

import operator

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils, config
from numba.core.extending import intrinsic, models, overload, register_model

LANES = 16
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


vector = _Vector()


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, _FLOATS)


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
            # LLVM may fuse a product and the sum it goes into, on machines with fused multiply-add.
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
        return builder.bitcast(bits, _FLOATS)

    return vector(v), code


@intrinsic
def _scaled(typing_context, p, exponent):
    """Return p 2^n, n the low byte of the bits of `exponent`; adding it to p's exponent is cheaper than to multiply."""

    def code(context, builder, signature, values):
        p, exponent = (builder.bitcast(v, _INTS) for v in values)
        return builder.bitcast(builder.add(p, builder.shl(exponent, _ints(23))), _FLOATS)

    return vector(p, exponent), code


def _instruction(name: str, *further: ir.Constant):
    """Return the code of an intrinsic of vectors that is one instruction of AVX-512.

    Args:
        name: of LLVM's intrinsic. further: the arguments that it takes after the vectors.
    """

    def code(context, builder, signature, values):
        arguments = [*values, *further]
        function_type = ir.FunctionType(_FLOATS, [argument.type for argument in arguments])
        function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
        return builder.call(function, arguments)

    return code


# What lanes get that are switched off, the mask by which none is, and the rounding mode: the usual one.
_NOTHING, _ALL_LANES, _ROUNDING = ir.Constant(_FLOATS, ir.Undefined), ir.IntType(16)(0xFFFF), ir.IntType(32)(4)
_MINUS_FLOOR = ir.IntType(32)(0b1001)


@intrinsic
def _fraction(typing_context, v):
    """Return v - floor(v); 0 for an infinite v."""
    name = "llvm.x86.avx512.mask.reduce.ps.512"
    return vector(v), _instruction(name, _MINUS_FLOOR, _NOTHING, _ALL_LANES, _ROUNDING)


@intrinsic
def _scaled_by_floor(typing_context, p, v):
    """Return p 2^floor(v)."""
    return vector(p, v), _instruction("llvm.x86.avx512.mask.scalef.ps.512", _NOTHING, _ALL_LANES, _ROUNDING)


@intrinsic
def _estimated_reciprocal(typing_context, v):
    """Return 1 / v, accurate to 2^-14 relative."""
    return vector(v), _instruction("llvm.x86.avx512.rcp14.ps.512", _NOTHING, _ALL_LANES)


def _compiles_for_avx512() -> bool:
    """Return whether Numba compiles for a processor with AVX-512; its settings can name another one than this."""
    if not config.ENABLE_AVX:
        return False
    if config.CPU_FEATURES is not None:
        return {"+avx512f", "+avx512dq"} <= set(config.CPU_FEATURES.split(","))
    if config.CPU_NAME not in (None, "host"):
        return False
    features = binding.get_host_cpu_features()
    return bool(features.get("avx512f") and features.get("avx512dq"))


HAS_AVX512 = _compiles_for_avx512()


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
            loaded = builder.bitcast(builder.shl(builder.zext(loaded, _INTS), _ints(16)), _FLOATS)
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


def _fitted(function, low: float, high: float, degree: int) -> tuple[np.float32, ...]:
    """Return the coefficients, lowest first, of the near-minimax polynomial of `function` on [low, high]."""
    nodes = np.cos((2 * np.arange(1000) + 1) * np.pi / 2000) * (high - low) / 2 + (high + low) / 2
    fit = np.polynomial.Chebyshev.fit(nodes, function(nodes), degree, domain=[low, high])
    return tuple(np.float32(c) for c in fit.convert(kind=np.polynomial.Polynomial).coef)


def _interpolated_exp2() -> tuple[np.float32, ...]:
    """Return the coefficients of q, lowest first, where 1 + f q(f) interpolates 2^f on [0, 1], at 0 and 1 too.

    The nodes are the zeros of the Chebyshev polynomial of degree 6, stretched so that the outermost lie at the ends.
    The float32 sum of the coefficients, as Horner's rule adds them, is 1.
    """
    nodes = (1 + np.cos((2 * np.arange(6) + 1) * np.pi / 12) / np.cos(np.pi / 12)) / 2
    _, _, *others = np.linalg.solve(np.vander(nodes, increasing=True), np.exp2(nodes)).astype(np.float32)
    rest = np.float32(0)
    for coefficient in reversed(others):
        rest = coefficient + rest
    return np.float32(1) - rest, *others


LOG2_E = np.float32(np.log2(np.e))
# Adding it to a small number leaves that number, rounded, in the low bits.
_ROUNDER = np.float32(1.5 * 2**23)
# 2^f = 1 + f q(f), so that 2^0 is exactly 1 and a state without decay does not shrink by rounding.
_Q0, _Q1, _Q2, _Q3, _Q4 = _fitted(lambda f: np.expm1(f * np.log(2)) / f, -0.5, 0.5, 4)
# The same for [0, 1], with q(1) = 1: the fraction of a small negative exponent is rounded to 1, and 2^1 2^-1 must be 1.
_F0, _F1, _F2, _F3, _F4 = _interpolated_exp2()
# log(1 + x) = 2 artanh(s), s = x / (2 + x): this is 2 artanh(s) / s in s^2, for x in [0, 1].
_S0, _S1, _S2, _S3, _S4 = _fitted(lambda s2: 2 * np.arctanh(np.sqrt(s2)) / np.sqrt(s2), 0.0, 1 / 9, 4)


# Decorators of the kernels and of the functions that they call with arrays: division by numpy's rules, which raises no
# exception, and no reference counting of arrays at each such call, which took half of the time.
kernel = njit(error_model="numpy")
helper = njit(error_model="numpy", _nrt=False)


@njit
def exp2_portable(v):
    """Return 2^v, accurate to 3e-7 relative, clamped to 2^-125 and 2^127; NaN for the NaN that arithmetic gives."""
    v = minimum(maximum(v, -125.0), 127.0)
    rounded = v + _ROUNDER
    f = v - (rounded - _ROUNDER)
    p = 1.0 + f * (_Q0 + f * (_Q1 + f * (_Q2 + f * (_Q3 + f * _Q4))))
    return _scaled(p, rounded)


@njit
def exp2_avx512(v):
    """Return 2^v, accurate to 2e-7 relative, in 7 instructions instead of 12: AVX-512 reduces and scales in one each.

    Nothing is clamped: results below the smallest normal number are denormal or 0, and those beyond the largest inf.
    """
    f = _fraction(v)
    p = 1.0 + f * (_F0 + f * (_F1 + f * (_F2 + f * (_F3 + f * _F4))))
    return _scaled_by_floor(p, v)


@njit
def reciprocal_portable(v):
    """Return 1 / v."""
    return 1.0 / v


@njit
def reciprocal_avx512(v):
    """Return 1 / v for normal v with a normal reciprocal, accurate to 2e-7 relative: an estimate of 14 bits, refined.

    A division of sixteen lanes takes 16 cycles, this takes 4.
    """
    estimate = _estimated_reciprocal(v)
    return estimate + estimate * (1.0 - v * estimate)


exp2 = exp2_avx512 if HAS_AVX512 else exp2_portable
reciprocal = reciprocal_avx512 if HAS_AVX512 else reciprocal_portable


@njit
def sigmoid(v):
    """Return 1 / (1 + e^-v), accurate to 4e-6 relative on [-60, 60]."""
    return reciprocal(1.0 + exp2(minimum(v * -LOG2_E, 100.0)))


@njit
def softplus(v):
    """Return log(1 + e^v) to 4e-6 relative on [-60, 60], mostly the rounding of v log2(e); v itself from 20 on."""
    x = exp2(minus_magnitude(v) * LOG2_E)
    s = x * reciprocal(2.0 + x)
    s2 = s * s
    return maximum(v, 0.0) + s * (_S0 + s2 * (_S1 + s2 * (_S2 + s2 * (_S3 + s2 * _S4))))


@intrinsic
def next_item(typing_context, table):
    """Return the first word of `table`, an int64 array, and increment it, atomically."""

    def code(context, builder, signature, values):
        counter = context.make_array(signature.args[0])(context, builder, values[0]).data
        return builder.atomic_rmw("add", counter, ir.IntType(64)(1), "monotonic")

    return types.uint64(table), code


@intrinsic
def array_at(typing_context, table, row, dtype):
    """Return the array (3 axes, any strides) whose address, shape and strides are `row` of `table` (rows, 7)."""
    array_type = types.Array(dtype.dtype, 3, "A")

    def code(context, builder, signature, values):
        word = ir.IntType(64)
        words = context.make_array(signature.args[0])(context, builder, values[0]).data
        first = builder.gep(words, [builder.mul(builder.zext(values[1], word), word(7))])
        address, *sizes = (builder.load(builder.gep(first, [word(i)])) for i in range(7))
        array = context.make_array(array_type)(context, builder)
        item = context.get_data_type(array_type.dtype)
        size = word(context.get_abi_sizeof(item))
        context.populate_array(
            array,
            data=builder.inttoptr(address, item.as_pointer()),
            shape=cgutils.pack_array(builder, sizes[:3]),
            strides=cgutils.pack_array(builder, [builder.mul(stride, size) for stride in sizes[3:]]),
            itemsize=size,
            meminfo=None,
        )
        return array._getvalue()

    return array_type(table, row, dtype), code


@njit
def scratch(rows):
    """Allocate (rows, 16) float32, not filled, each row on one cache line: rows across two took 1.5 times as long."""
    flat = np.empty((rows + 1) * LANES, np.float32)
    skip = (-flat.ctypes.data % (4 * LANES)) // 4
    return flat[skip : skip + rows * LANES].reshape(rows, LANES)
