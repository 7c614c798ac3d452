"""Compiles every Triton kernel for GPUs that need not be there, and tells what ptxas made of it.

Run as `TRITON_INTERPRET=0 python -m gsae.tests.support.cross_compile CAPABILITY D_IN` (90 for an H100): one JSON line a
kernel with its registers, the bytes of its stack (where registers are spilled) and its loads by width.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

FLOAT, HALF, DOUBLE, INT, LONG = "*fp32", "*bf16", "*fp64", "*i32", "*i64"


def main() -> None:
    """Compile for one capability, and rows of one width."""
    import triton

    capability, d_in = int(sys.argv[1]), int(sys.argv[2])
    assert not triton.knobs.runtime.interpret
    for name, kernel, signature, constants, options in kernels(d_in):
        print(json.dumps({"kernel": name, **compiled(kernel, signature, constants, options, capability)}), flush=True)  # noqa: T201  (its result)


def kernels(d_in: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Name, function, signature, constants and options of every kernel, as the modules of `train/step` launch it."""
    from gsae.train.step import adam_triton, dense_triton, gates_triton, inputs_triton, sparse_triton
    from gsae.train.step import encode_triton as encode
    from gsae.train.step.triton_support import FIXED, row_in_registers

    row = row_in_registers(d_in)
    width = {"d_in": d_in, "WIDTH": row.pop("WIDTH")}
    warps, four, many = row, FIXED, row_in_registers(d_in, warps=16)
    del many["WIDTH"]
    tile = {"LATENTS": dense_triton.LATENTS, "ACROSS": dense_triton.ACROSS}
    block = {"ROWS": dense_triton.ROWS, "COLUMNS": dense_triton.COLUMNS}
    found = []
    for gated in (True, False):
        kind, flag = "gated" if gated else "relu", {"gated": gated}
        found += [
            _of(f"forward {kind}", dense_triton._forward, f"pre={HALF} features={HALF} positive={HALF} fired={INT} "
                f"opened={INT} latents=i32 rows=i32", {**flag, **tile}, four),
            _of(f"backward {kind}", dense_triton._backward, f"pre={HALF} by_features={HALF} by_positive={HALF} "
                "latents=i32 d_sae=i32 rows=i32", {**flag, **tile}, four),
            _of(f"errors {kind}", dense_triton._errors, f"recon={HALF} other={HALF} sums={DOUBLE} rows=i32 d_in=i32",
                {"two": gated, **block}, four),
            _of(f"rows {kind}", sparse_triton._rows, f"row_starts={INT} entries={INT} latents={INT} rows=i32 d_sae=i32",
                {**flag, **width}, warps),
            _of(f"segments {kind}", sparse_triton._segments, f"owners={INT} starts={INT} rows_of={INT} segments={INT} "
                "latents=i32 d_sae=i32 rows=i32", {**flag, **width, "SEGMENT": sparse_triton.SEGMENT}, warps),
            _of(f"latents {kind}", sparse_triton._latents, f"starts={INT} rows_of={INT} segments={INT} low={HALF} "
                f"stamps={LONG} number={LONG} fired_on={INT} bad={INT} log2_beta2=fp32 rest=fp32 eps=fp32 grown=fp32 "
                "lost=fp32 d_sae=i32 rows=i32",
                {**flag, **width, "row_clip": True, "LATENTS": sparse_triton.LATENTS,
                 "SEGMENT": sparse_triton.SEGMENT}, many),
        ]  # fmt: skip
    for decoder in (True, False):
        found.append(
            _of(f"adam {'decoder' if decoder else 'encoder'}", adam_triton._matrix, f"operand={HALF} grad={HALF} "
                f"bad={INT} d_sae=i32 beta2=fp32 rest=fp32 eps=fp32",
                {"decoder": decoder, "row_clip": True, "cast": True, **width}, warps)
        )  # fmt: skip
    gates, words = gates_triton, 128
    return [
        *found,
        _of("centred", inputs_triton._centred, f"rows={HALF} scale=fp32", width, warps),
        _of("masked product", encode._masked_product, f"W_enc=tensordesc<bf16[{encode.LATENTS},{encode.DEPTH}]> "
            f"low=tensordesc<bf16[{encode.ROWS},{encode.DEPTH}]> masks={INT} d_sae=i32 rows=i32 words=i32",
            {"d_in": d_in, "interpreted": False, "LATENTS": encode.LATENTS, "ROWS": encode.ROWS,
             "DEPTH": encode.DEPTH}, encode.OPTIONS),
        _of("count", encode._count, f"masks={INT} counts={INT} latents=i32 words=i32",
            {"COUNTED": encode.COUNTED, "WIDTH": words}, four),
        _of("shadows", gates._shadows, f"low={HALF} grown=fp32 lost=fp32", width, warps),
        _of("rounded inputs", gates._rounded_inputs, f"low={HALF} rows=i32 grown=fp32", width, warps),
        _of("mask", gates._mask, f"pre={HALF} masks={INT} counts={INT} latents=i32 d_sae=i32 rows=i32 words=i32",
            {"LATENTS": gates.LATENTS, "WORDS": gates.WORDS}, four),
        _of("list", gates._list, f"masks={INT} starts={INT} latent_of={INT} row_of={INT} words=i32 capacity=i32",
            {"WORDS": words}, gates.ONE_WARP),
        _of("decide", gates._decide, f"starts={INT} latent_of={INT} row_of={INT} opened={INT} latents=i32 d_sae=i32 "
            "capacity=i32", {**width, "ENTRIES": gates.ENTRIES}, warps),
        _of("keep", gates._keep, f"opened={INT} places={INT} latent_of={INT} row_of={INT} kept_latents={INT} "
            f"kept_rows={INT} d_sae=i32 rows=i32 capacity=i32 room=i32", {"AT_A_TIME": gates.AT_A_TIME}, four),
    ]  # fmt: skip


def _of(
    name: str, kernel: Any, types: str, constants: dict[str, Any], options: dict[str, Any]
) -> tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]:
    """A kernel whose arguments are pointers to float32, but those that `types` or `constants` name."""
    given = dict(pair.split("=") for pair in types.split())
    assert given.keys() | constants.keys() <= set(kernel.arg_names), name
    signature = {arg: "constexpr" if arg in constants else given.get(arg, FLOAT) for arg in kernel.arg_names}
    return name, kernel, signature, constants, options


def compiled(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], options: dict[str, Any], capability: int
) -> dict[str, Any]:
    """What ptxas made of a kernel whose pointers and sizes are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = {(n,): [["tt.divisibility", 16]] for n, kind in enumerate(signature.values()) if kind[0] in "*i"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = _run(tools / "nvdisasm", file.name)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    loads = Counter(re.findall(r"\bLDG\.E(?:\.\w+)*?\.?(128|64|U16|\b)", code))
    return {
        "registers": int(registers),
        "stack": int(stack),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "wide_loads": loads["128"],
        "loads": sum(loads.values()),
        "tensor_cores": len(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA)\b", code)),
        "tile_loads": len(re.findall(r"\bUTMALDG\b", code)),
        "atomics": len(re.findall(r"\b(?:ATOM|ATOMG|RED)\b", code)),
    }


def _run(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
