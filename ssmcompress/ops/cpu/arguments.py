"""The arguments of a kernel: a table with seven int64 per row, shared by all threads of a team.

The first row has the counter of items, flags and sizes; each further row has the address, shape and strides of one
array.
"""

from __future__ import annotations

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

COLUMNS = 7

_WORD = ir.IntType(64)
# Flush to zero and denormals are zero, in the control register of vector units.
_FLUSH_AND_ZERO = 0x8040
_HAS_MXCSR = platform.machine().lower() in ("x86_64", "amd64")


@intrinsic
def next_item(typing_context, table):
    """Atomically increment the first word of `table`, an int64 array, and return its previous value."""

    def code(context, builder, signature, values):
        counter = context.make_array(signature.args[0])(context, builder, values[0]).data
        return builder.atomic_rmw("add", counter, _WORD(1), "monotonic")

    return types.uint64(table), code


@intrinsic
def arguments(typing_context, table, flags, dtypes):
    """Return the arguments of a kernel: the first row of `table` (rows, 7), its flags, and its arrays (3 axes each).

    Args:
        flags: the Numba types of the words after the counter: boolean, int64 or uint64. dtypes: those of the arrays.
    """
    rows = types.Array(types.int64, 1, "C")
    flag_types = [t.dtype for t in flags]
    array_types = [types.Array(t.dtype, 3, "A") for t in dtypes]
    result = types.Tuple([rows, *flag_types, *array_types])

    def code(context, builder, signature, values):
        words = context.make_array(signature.args[0])(context, builder, values[0]).data
        read = [_array(context, builder, rows, words, [_WORD(COLUMNS)], [_WORD(1)])]
        for column, flag in enumerate(flag_types, 1):
            word = builder.load(builder.gep(words, [_WORD(column)]))
            read.append(builder.icmp_unsigned("!=", word, _WORD(0)) if flag is types.boolean else word)
        for row, array_type in enumerate(array_types, 1):
            address, *sizes = (builder.load(builder.gep(words, [_WORD(row * COLUMNS + i)])) for i in range(COLUMNS))
            data = builder.inttoptr(address, context.get_data_type(array_type.dtype).as_pointer())
            read.append(_array(context, builder, array_type, data, sizes[:3], sizes[3:]))
        return context.make_tuple(builder, result, read)

    return result(table, flags, dtypes), code


def _array(context, builder, array_type, data, shape, strides):
    array = context.make_array(array_type)(context, builder)
    size = _WORD(context.get_abi_sizeof(context.get_data_type(array_type.dtype)))
    context.populate_array(
        array,
        data=data,
        shape=cgutils.pack_array(builder, shape),
        strides=cgutils.pack_array(builder, [builder.mul(stride, size) for stride in strides]),
        itemsize=size,
        meminfo=None,
    )
    return array._getvalue()


@intrinsic
def flush_denormals(typing_context):
    """Set denormal numbers to zero in this thread; return the argument of `restore`.

    With small decays, factors and states become denormal, for which processors are many times slower: a scan in which a
    third of the tokens follow a gap of ten took 2.5 times as long. This is done on x86-64 only.
    """

    def code(context, builder, signature, values):
        if not _HAS_MXCSR:
            return ir.IntType(32)(0)
        place, access = _register(builder)
        access("stmxcsr")
        before = builder.load(place)
        builder.store(builder.or_(before, before.type(_FLUSH_AND_ZERO)), place)
        access("ldmxcsr")
        return before

    return types.uint32(), code


@intrinsic
def restore(typing_context, before):
    """Undo `flush_denormals`, given its result `before`."""

    def code(context, builder, signature, values):
        if _HAS_MXCSR:
            place, access = _register(builder)
            builder.store(values[0], place)
            access("ldmxcsr")
        return context.get_dummy_value()

    return types.void(before), code


def _register(builder):
    """Return a memory location for the control register, and a function that reads or writes the register there."""
    place, byte = cgutils.alloca_once(builder, ir.IntType(32)), ir.IntType(8).as_pointer()

    def access(instruction: str) -> None:
        name = f"llvm.x86.sse.{instruction}"
        function = builder.module.globals.get(name)
        function = function or ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [byte]), name)
        builder.call(function, [builder.bitcast(place, byte)])

    return place, access
