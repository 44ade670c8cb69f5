"""Compiles every kernel for GPUs that are not here: python -m tests.compile_kernels. Prints
architecture, kernel, bytes of shared memory; what Triton's interpreter takes and its compiler does
not, fails. A process of its own, for it is not interpreted."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import train_gpt as t

NUMBERS = dict(M="i32", N="i32", K="i32", stride_k="i32", stride_n="i32", slope="fp32")


def compiled(
    kernel, architecture: int, pointers: dict[str, str], constants: dict, **options
) -> int:
    """Bytes of shared memory; pointers and sizes are multiples of 16,
    as PyTorch's and the model's are."""
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else pointers.get(name) or NUMBERS[name]
        for name in names
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name] == "i32" or name in pointers
    }
    source = ASTSource(
        kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned
    )
    return triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=options
    ).metadata.shared


for backward in (False, True):
    fast = "stride_n" if backward else "stride_k"  # the one that is 1
    for architecture, tile in ((90, t.MLP_TILE), (89, dict(t.MLP_TILE, BN=64))):
        sizes = {name: tile[name] for name in ("BM", "BN", "BK")}
        shared = compiled(
            t.mlp_kernel,
            architecture,
            dict.fromkeys(("a_ptr", "b_ptr", "z_ptr", "out_ptr"), "*bf16"),
            dict(BACKWARD=backward, **{fast: 1}, **sizes),
            num_warps=tile["num_warps"],
            num_stages=tile["num_stages"],
        )
        print(architecture, "mlp_kernel", shared)
