"""The reading of machine code, the bytes in flight, and the comparison of two builds of a kernel."""

from __future__ import annotations

import pytest

from benchmarks.resources import sass
from benchmarks.resources.comparison import compare, hunks, normal_form
from benchmarks.resources.in_flight import (
    bytes_before_use,
    in_flight,
    innermost_loops,
    main_loop,
    resident_threads,
)
from support.machine_code import assembled, kernel

SYMBOL = "_ZN12fused_tricks4cuda11scan_kernelINS0_9ArgumentsILi256ELi4EEEEEvT_"
DUMP = f"""
Fatbin elf code:
================
arch = sm_90
code version = [1,8]
compile_size = 64bit

64-bit ELF: type=ET_EXEC, ABI=8, sm=90, toolkit=13.0, flags=0x6005a04
.nv.info.{SYMBOL}
	<0x1>
	Attribute:	EIATTR_MAXREG_COUNT
	Format:	EIFMT_HVAL
	Value:	0xff
	<0x2>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x100 0x1 0x1
	<0x3>

Resource usage:
 Common:
  GLOBAL:0
 Function {SYMBOL}:
  REG:40 STACK:8 SHARED:1256 LOCAL:16 CONSTANT[0]:32816 TEXTURE:0 SURFACE:0 SAMPLER:0

	code for sm_90
	.target	sm_90

		Function : {SYMBOL}
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;         /* 0x00000a00ff017b82 */
                                                                  /* 0x000fe20000000800 */
        /*0010*/              @!P0 BRA 0x0 ;                      /* 0x0000001c006c0947 */
                                                                  /* 0x000fea0003800000 */
        /*0020*/                   NOP;                           /* 0x0000000000007918 */
                                                                  /* 0x000fc00000000000 */
		..........
"""
CUBIN = """
64bit elf: type=2, abi=7, sm=90a, toolkit=129, flags = 0x5a0d5a
.nv.info.write_kernel
	Attribute:	EIATTR_REQNTID
	Format:	EIFMT_SVAL
	Value:	0x20 0x1 0x1
 Function write_kernel:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:680 TEXTURE:0 SURFACE:0 SAMPLER:0

	code for sm_90a
		Function : write_kernel
        /*0000*/                   EXIT ;                         /* 0x000000000000794d */
"""


def test_a_kernel_is_read_from_the_dump_without_encodings_and_padding() -> None:
    (found,) = sass.parse(DUMP)
    assert found._replace(code=()) == ("sm_90", "scan 256", (), 40, 24, 1256, 256)
    assert found.code == ((0x00, "", "LDC R1, c[0x0][0x28]"), (0x10, "@!P0", "BRA 0x0"))


def test_a_cubin_is_read_as_a_module_is() -> None:
    (found,) = sass.parse(CUBIN)
    assert (found.architecture, found.name, found.registers, found.threads) == (
        "sm_90",
        "write_kernel",
        8,
        32,
    )


def test_every_kernel_of_every_architecture_is_read() -> None:
    found = sass.parse(
        DUMP + DUMP.replace("sm_90", "sm_100").replace("sm=90", "sm=100").replace("256E", "9E")
    )
    assert [(each.architecture, each.name, len(each.code)) for each in found] == [
        ("sm_90", "scan 256", 2),
        ("sm_100", "scan 9", 2),
    ]


@pytest.mark.parametrize(
    ("loop", "expected"),
    [
        ("LDG.E.128 R4, [R2.64]; LDG.E.128 R8, [R2.64+0x10]; FADD R0, R4, R1; LDG.E.128 R12, [R2.64]", 32),
        ("LDG.E.64 R4, [R2.64]; LDG.E R6, [R2.64]; LDG.E.U16 R7, [R2.64]; LDG.E.U8 R8, [R2.64]; EXIT", 15),
        ("LDG.E.128 R4, [R2.64]; FADD R0, R7, R1; LDG.E.128 R8, [R2.64]", 16),
        ("LDG.E R5, [R2.64]; LDG.E R4, [R4.64]; LDG.E R6, [R2.64]", 4),
        ("LDG.E.64 R4, [R2.64]; CS2R R4, SRZ; LDG.E.64 R6, [R2.64]", 8),
        ("LDG.E.128 R4, [R4.64]; LDG.E.128 R8, [R2.64]; STG.E.128 [R2.64], R4; LDG.E.128 R12, [R2.64]", 32),
        ("LDG.E.EF.128 R4, desc[UR4][R2.64]; LD.E.64 R8, desc[UR8][R2.64]; EXIT", 24),
        ("LDS.128 R4, [R2]; LDC.64 R8, c[0x0][0x10]; EXIT", 0),
    ],
    ids=[
        "loads after the first use",
        "sizes",
        "the last register of a load",
        "a wide address",
        "a register that is overwritten",
        "a load over its own address",
        "modifiers",
        "shared and constant memory",
    ],
)
def test_loads_count_up_to_the_first_instruction_that_names_a_loaded_register(
    loop: str, expected: int
) -> None:
    assert bytes_before_use(assembled(loop.replace(";", "\n"))) == (expected, expected)


def test_a_load_under_a_predicate_from_outside_of_the_loop_is_an_option() -> None:
    loop = assembled(
        """
        ISETP.GE.AND P0, PT, R0, R1, PT
        IADD3 R2, P3, R2, R3, RZ
        @P0 LDG.E.128 R4, [R2.64]
        @!P3 LDG.E.128 R8, [R2.64]
        @!P2 LDG.E.128 R12, [R2.64]
        SEL R0, R1, R3, P2
        @P0 BRA P2, 0x0
        """
    )
    assert bytes_before_use(loop) == (32, 48)


LOOPS = """
    outer:
    MOV R0, RZ
    first:
    LDG.E.128 R4, [R2.64]
    LDG.E.128 R8, [R2.64+0x10]
    FADD R0, R4, R8
    FADD R0, R0, R8
    @P0 BRA first
    second:
    LDG.E.128 R4, [R2.64]
    HADD2.F32 R0, -RZ, R4.H0_H0
    @!P0 BRA skipped
    FADD R1, R1, R1
    skipped:
    @P0 BRA second
    third:
    LDG.E R4, [R2.64]
    HADD2.F32 R0, -RZ, R4.H0_H0
    FADD R0, R0, R0
    FADD R0, R0, R0
    FADD R0, R0, R0
    FADD R0, R0, R0
    @P0 BRA third
    fourth:
    LDG.E.128 R4, [R2.64]
    HADD2.F32 R0, -RZ, R4.H0_H0
    @P0 BRA fourth
    @P1 BRA outer
    EXIT
"""


def test_a_loop_around_other_loops_is_not_innermost() -> None:
    begins = [(loop[0].address, loop[-1].address) for loop in innermost_loops(assembled(LOOPS))]
    assert begins == [(0x10, 0x50), (0x60, 0xA0), (0xB0, 0x110), (0x120, 0x140)]


def test_the_main_loop_is_the_longest_one_with_16_byte_loads_and_a_conversion_from_fp16() -> None:
    assert main_loop(assembled(LOOPS))[0].address == 0x60


def test_without_a_conversion_the_main_loop_is_the_longest_one_with_16_byte_loads() -> None:
    code = assembled(LOOPS.replace("HADD2.F32", "HADD2"))
    assert main_loop(code) == [each for each in code if 0x10 <= each.address <= 0x50]


def test_a_kernel_without_a_wide_loop_has_no_bytes_in_flight() -> None:
    assert in_flight(kernel("begin:\nLDG.E R4, [R2.64]\n@P0 BRA begin")) is None


def test_an_unknown_architecture_has_no_bytes_in_flight() -> None:
    assert in_flight(kernel(LOOPS, architecture="sm_61")) is None


def test_bytes_in_flight_are_those_of_all_resident_threads() -> None:
    loop = "begin:\nLDG.E.128 R4, [R2.64]\n@P1 LDG.E.64 R8, [R2.64]\n@P0 BRA begin"
    found = in_flight(kernel(loop, registers=64))
    assert found == (16 * 1024, 24 * 1024)
    assert str(found) == "16 to 24"


@pytest.mark.parametrize(
    ("architecture", "registers", "shared", "threads", "expected"),
    [
        ("sm_90", 32, 0, 256, 2048),
        ("sm_80", 33, 0, 256, 1536),
        ("sm_90", 80, 0, 32, 768),
        ("sm_100", 64, 1192, 256, 1024),
        ("sm_75", 24, 0, 256, 1024),
        ("sm_86", 24, 0, 256, 1536),
        ("sm_89", 16, 0, 32, 768),
        ("sm_120", 16, 0, 32, 768),
        ("sm_90", 16, 50000, 256, 1024),
    ],
    ids=[
        "all threads",
        "registers in units of 256",
        "registers in four partitions",
        "registers",
        "1024 threads",
        "1536 threads",
        "24 blocks",
        "24 blocks of Blackwell",
        "shared memory",
    ],
)
def test_resident_threads_have_the_limits_of_cuda_occupancy(
    architecture: str, registers: int, shared: int, threads: int, expected: int
) -> None:
    found = kernel(architecture=architecture, registers=registers, shared=shared, threads=threads)
    assert resident_threads(found) == expected


BEFORE = """
    @P0 BRA end
    begin:
    MOV R5, R9
    LDG.E.128 R4, [R2.64]
    LDG.E.128 R8, [R6.64]
    IMAD.SHL.U32 R20, R21, 0x8, RZ
    FMUL R12, R4, UR4
    FFMA R12, R8, UR5, R12
    STG.E [R2.64], R12
    @P1 BRA begin
    end:
    EXIT
"""


def changed(before: str, after: str) -> list[str]:
    """The changed lines, without addresses."""
    lines = compare(assembled(before), assembled(after))
    return [
        f"{'+' if line.old is None else '-'} {line.instruction.guard} {line.instruction.text}".replace(
            "  ", " "
        )
        for line in lines
        if line.is_changed
    ]


def test_the_same_code_has_no_changed_lines() -> None:
    assert changed(BEFORE, BEFORE) == []


def test_of_a_changed_operation_only_its_line_is_changed_whatever_ptxas_does_to_the_others() -> None:
    after = """
        @P0 BRA end
        begin:
        IMAD.MOV.U32 R35, RZ, RZ, R39
        LDG.E.128 R24, [R22.64]
        FADD R30, R31, R31
        LDG.E.128 R28, [R26.64]
        FMUL R17, R24, UR6
        SHF.L.U32 R40, R41, 0x3, RZ
        FFMA R17, R28.reuse, UR7, R17
        STG.E [R22.64], R17
        @P2 BRA begin
        end:
        EXIT
    """
    assert changed(BEFORE, after) == ["+ FADD R30, R31, R31"]


def test_a_removed_operation_is_a_changed_line() -> None:
    assert changed(BEFORE, BEFORE.replace("FMUL R12, R4, UR4\n", "\n")) == ["- FMUL R12, R4, UR4"]


def test_another_constant_is_a_change() -> None:
    after = BEFORE.replace("0x8, RZ", "0x4, RZ")
    assert changed(BEFORE, after) == ["- IMAD.SHL.U32 R20, R21, 0x8, RZ", "+ IMAD.SHL.U32 R20, R21, 0x4, RZ"]


def test_another_guard_is_a_change() -> None:
    assert changed(BEFORE, BEFORE.replace("@P0 BRA", "@!P0 BRA")) == ["- @P0 BRA 0x90", "+ @!P0 BRA 0x90"]


def test_swapped_operands_are_a_change() -> None:
    after = BEFORE.replace("R8, UR5, R12", "R12, UR5, R8").replace("EXIT", "BAR.SYNC\nEXIT")
    assert changed(BEFORE, after) == ["- FFMA R12, R8, UR5, R12", "+ FFMA R12, R12, UR5, R8", "+ BAR.SYNC"]


def test_if_nothing_but_registers_differs_the_registers_are_compared() -> None:
    after = BEFORE.replace("R8, UR5, R12", "R8, UR5, R13")
    assert changed(BEFORE, after) == ["- FFMA R12, R8, UR5, R12", "+ FFMA R12, R8, UR5, R13"]


def test_accesses_to_memory_in_another_order_are_a_change() -> None:
    load, store = "LDG.E.64 R8, [R6.64]", "STG.E [R2.64], R12"
    before = f"{load}\nFADD R0, R0, R0\n{store}\nBAR.SYNC\nEXIT"
    after = f"{store}\nFADD R0, R0, R0\n{load}\nEXIT"
    assert {f"- {store}", f"+ {store}"} < {*changed(before, after)}


def test_an_operation_that_leaves_its_loop_is_a_change() -> None:
    before = "begin:\nLDG.E R4, [R2.64]\nMOV R5, R9\n@P1 BRA begin\nBAR.SYNC\nEXIT"
    after = "MOV R5, R9\nbegin:\nLDG.E R4, [R2.64]\n@P1 BRA begin\nEXIT"
    assert changed(before, after) == ["+ MOV R5, R9", "- MOV R5, R9", "- BAR.SYNC"]


def test_an_operation_that_moves_behind_a_branch_is_a_change() -> None:
    compare_and_branch = "ISETP.NE.AND P1, PT, R1, RZ, PT\n@P1 BRA end"
    before = f"MOV R5, R9\n{compare_and_branch}\nFADD R0, R0, R0\nend:\nBAR.SYNC\nEXIT"
    after = f"{compare_and_branch}\nMOV R5, R9\nFADD R0, R0, R0\nend:\nEXIT"
    assert changed(before, after) == ["- MOV R5, R9", "+ MOV R5, R9", "- BAR.SYNC"]


def test_a_branch_to_another_instruction_is_a_change() -> None:
    after = BEFORE.replace("begin:\n    MOV R5, R9", "MOV R5, R9\n    begin:").replace("MOV R5, R9", "NOP")
    before = BEFORE.replace("MOV R5, R9", "NOP")
    assert "- @P1 BRA 0x10" in changed(before, after)
    assert "+ @P1 BRA 0x20" in changed(before, after)


def test_a_branch_to_an_instruction_that_was_put_before_its_target_is_unchanged() -> None:
    after = BEFORE.replace("begin:", "begin:\nBAR.SYNC")
    assert changed(BEFORE, after) == ["+ BAR.SYNC"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("MOV R1, R2", "IMAD.MOV.U32 R3, RZ, RZ, R4"),
        ("MOV R1, 0x2", "HFMA2.MMA R7, -RZ, RZ, 0, 1.1920928955078125e-07"),
        ("MOV R1, 0x3f800000", "HFMA2 R7, -RZ, RZ, 1.875, 0"),
        ("SHF.L.U32 R1, R2, 0x3, RZ", "IMAD.SHL.U32 R5, R6, 0x8, RZ"),
        ("SHF.L.U32 R1, R2, 0x10, RZ", "IMAD.U32 R5, R6, 0x10000, RZ"),
        ("VIADD R1, R2, 0x100", "IADD3 R1, R2, 0x100, RZ"),
        ("IMAD.IADD R1, R2, 0x1, R3", "IADD3 R4, R5.reuse, R6, RZ"),
        ("IMAD.X R9, R5, 0x1, R9, P1", "IADD3.X R9, R5, R9, RZ, P2, !PT"),
        ("IMAD.X R9, RZ, RZ, R9, P1", "IADD3.X R9, RZ, R9, RZ, P1, !PT"),
    ],
)
def test_opcodes_with_the_same_meaning_have_one_normal_form(one: str, other: str) -> None:
    assert normal_form(assembled(one)[0]) == normal_form(assembled(other)[0])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("IMAD.SHL.U32 R1, R2, 0x8, RZ", "IMAD.SHL.U32 R1, R2, 0x4, RZ"),
        ("IADD3 R1, R2, R3, R4", "IADD3 R1, R2, R3, RZ"),
        ("IADD3 R1, R2, -R3, RZ", "IADD3 R1, R2, R3, RZ"),
        ("LDG.E.128 R4, [R2.64]", "LDG.E.EF.128 R4, [R2.64]"),
        ("FADD R1, R2, UR3", "FADD R1, R2, R3"),
        ("@P0 MOV R1, R2", "@!P0 MOV R1, R2"),
        ("ISETP.NE.AND P0, PT, R1, RZ, PT", "ISETP.NE.AND P0, PT, R1, R2, PT"),
    ],
)
def test_other_operations_have_another_normal_form(one: str, other: str) -> None:
    assert normal_form(assembled(one)[0]) != normal_form(assembled(other)[0])


def test_a_hunk_is_a_changed_line_with_the_lines_around_it() -> None:
    lines = compare(assembled(BEFORE), assembled(BEFORE.replace("FMUL R12, R4, UR4\n", "\n")))
    assert [[str(line) for line in hunk] for hunk in hunks(lines, context=1)] == [
        [
            " 00040       IMAD.SHL.U32 R20, R21, 0x8, RZ",
            "-00050       FMUL R12, R4, UR4",
            " 00050       FFMA R12, R8, UR5, R12",
        ]
    ]
