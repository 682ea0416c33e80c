"""Flags with which XLA compiles a small program for the CPU in an eighth of the time. Speed is all they are about: the
program is the same, though how it is fused, and so how its last bits are rounded, may differ."""

from importlib.metadata import PackageNotFoundError, version

UNOPTIMISED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""Without LLVM's optimisation passes: two training steps of the tests' model are compiled in 11 seconds, not 20."""
IN_ONE_PART = "--xla_cpu_parallel_codegen_split_count=1"
"""Not cut into parts for threads, which two workers on two cores lack: in 2.2 seconds with the flag below, not 2.9."""
PLAIN_FUSIONS = "--xla_cpu_use_fusion_emitters=false"
"""Fusions written down straight as LLVM's instructions, not by way of MLIR: in 3 seconds."""
WITHOUT_PLAIN_FUSIONS = (0, 11, 1)
"""The first jaxlib that has only the way of MLIR. XLA ends a process that names a flag it does not know."""


def quick_flags() -> str:
    """The value of `XLA_FLAGS` for the installed jaxlib, if any. To be set before JAX is first used."""
    quick = f"{UNOPTIMISED} {IN_ONE_PART}"
    try:
        installed = tuple(int(part) for part in version("jaxlib").split(".")[:3])
    except (PackageNotFoundError, ValueError):  # none, or one built by hand
        return quick
    return f"{quick} {PLAIN_FUSIONS}" if installed < WITHOUT_PLAIN_FUSIONS else quick
