"""The text of `wgmma.cuh`: one struct for every tile width and element type, differing only in their operand lists."""


def wgmma_source() -> str:
    """Specialisations of `Wgmma<N, Element, TransposeA, TransposeB>` for N = 8, 16 … 256 and both 16-bit types.

    `issue` starts one m64nNk16 multiplication of two shared-memory operands into N / 2 fp32 registers per
    thread; with `accumulate` false it ignores their old values, so that they need not be zeroed.
    """
    lines = ["// Generated: see moekern/backends/cuda/build/wgmma.py."]
    for element, name in (("Bf16", "bf16"), ("F16", "f16")):
        for n in range(8, 257, 8):
            count = n // 2
            registers = ", ".join(f"%{i}" for i in range(count))
            outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
            lines.append(
                f"template <int TransposeA, int TransposeB> struct Wgmma<{n}, {element}, TransposeA, TransposeB> {{\n"
                "  static DEVICE void issue(float* d, u64 a, u64 b, bool accumulate) {\n"
                f'    asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{count + 2}, 0;\\n"\n'
                f'        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{name}.{name} {{{registers}}}, %{count}, '
                f'%{count + 1}, p, 1, 1, %{count + 3}, %{count + 4}; }}"\n'
                f'        : {outputs} : "l"(a), "l"(b), "r"((int)accumulate), "n"(TransposeA), "n"(TransposeB));\n'
                "  }\n};"
            )
    return "\n".join(lines) + "\n"
