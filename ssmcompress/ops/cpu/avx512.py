"""AVX-512 instructions that replace several steps of the portable functions of `lane_functions`."""

from __future__ import annotations

from llvmlite import binding, ir
from numba.core import config
from numba.core.extending import intrinsic

from .vector import FLOATS, vector


def _instruction(name: str, *further: ir.Constant):
    """Return the code generator of a vector intrinsic that is a single AVX-512 instruction.

    Args:
        name: name of LLVM's intrinsic. further: its arguments after the vectors.
    """

    def code(context, builder, signature, values):
        arguments = [*values, *further]
        function_type = ir.FunctionType(FLOATS, [argument.type for argument in arguments])
        function = builder.module.globals.get(name) or ir.Function(builder.module, function_type, name)
        return builder.call(function, arguments)

    return code


# Value of masked-out lanes, the mask that enables all lanes, and the default rounding mode.
_NOTHING, _ALL_LANES, _ROUNDING = ir.Constant(FLOATS, ir.Undefined), ir.IntType(16)(0xFFFF), ir.IntType(32)(4)
_MINUS_FLOOR = ir.IntType(32)(0b1001)


@intrinsic
def fraction(typing_context, v):
    """Return v - floor(v); 0 for an infinite v."""
    name = "llvm.x86.avx512.mask.reduce.ps.512"
    return vector(v), _instruction(name, _MINUS_FLOOR, _NOTHING, _ALL_LANES, _ROUNDING)


@intrinsic
def scaled_by_floor(typing_context, p, v):
    """Return p 2^floor(v)."""
    return vector(p, v), _instruction("llvm.x86.avx512.mask.scalef.ps.512", _NOTHING, _ALL_LANES, _ROUNDING)


@intrinsic
def estimated_reciprocal(typing_context, v):
    """Return 1 / v, accurate to 2^-14 relative."""
    return vector(v), _instruction("llvm.x86.avx512.rcp14.ps.512", _NOTHING, _ALL_LANES)


def _compiles_for_avx512() -> bool:
    """Return whether Numba compiles for a processor with AVX-512; its settings can name a different target."""
    if not config.ENABLE_AVX:
        return False
    if config.CPU_FEATURES is not None:
        return {"+avx512f", "+avx512dq"} <= set(config.CPU_FEATURES.split(","))
    if config.CPU_NAME not in (None, "host"):
        return False
    features = binding.get_host_cpu_features()
    return bool(features.get("avx512f") and features.get("avx512dq"))


HAS_AVX512 = _compiles_for_avx512()
