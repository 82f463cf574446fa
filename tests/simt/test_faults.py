"""Each planted fault of kernels/faults.cu is reported by what should find it; its corrected twin is clean."""

from __future__ import annotations

import pytest

# Faults that the emulator itself reports, in any build: (case, words of the message)
REPORTED = [
    (
        "divergent",
        [
            "divergent_barrier<true>",
            "block (0, 0, 0)",
            "40 wait at __syncthreads",
            "faults.cu:",
            "24 of 64 have exited",
        ],
    ),
    ("two_branches", ["divergent barrier", "32 wait at __syncthreads", "thread 1, 0, 0"]),
    ("divergent_shuffle", ["7 wait at a shuffle", "25 wait at __syncthreads"]),
    ("mask", ["does not name the calling lane", "thread (0, 0, 0)", "faults.cu:"]),
    ("async_never", ["never waited for"]),
    ("allow_shared", ["more dynamic shared memory than was allowed"]),
    ("configuration", ["invalid launch configuration"]),
]

# Faults that change the result with the fill, the order or the moment of a copy: (case, one schedule, another)
REVEALED = [
    ("uninitialised", {"fill": "00"}, {"fill": "ff"}),
    ("absent_lane", {"fill": "00"}, {"fill": "ff"}),
    ("barrier", {"order": "forward"}, {"order": "reverse"}),
    ("second_barrier", {"order": "forward"}, {"order": "reverse"}),
    ("async_wait", {"fill": "00"}, {"fill": "ff"}),
    ("async_pipeline", {"async": "wait"}, {"async": "issue"}),
    ("async_overwrite", {"order": "forward"}, {"order": "reverse"}),
]

# Faults that an instrumented build reports: (case, build, words of the report)
SANITIZED = [
    ("global_write", "asan", ["heap-buffer-overflow", "WRITE of size 4", "write_past_end"]),
    ("global_read", "asan", ["heap-buffer-overflow", "READ of size 4", "read_past_end"]),
    ("shared_write", "asan", ["use-after-poison", "WRITE of size 4", "write_past_shared"]),
    ("shared_index", "asan", ["out of bounds for type 'float [64]'"]),
    ("misaligned", "asan", ["misaligned address", "16 byte alignment"]),
    ("barrier", "tsan", ["data race", "missing_barrier"]),
    ("second_barrier", "tsan", ["data race", "missing_second_barrier"]),
    ("warp_barrier", "tsan", ["data race", "missing_warp_barrier"]),
    ("between_blocks", "tsan", ["data race", "blocks_write_one_place"]),
    ("async_wait", "tsan", ["data race"]),
    ("async_overwrite", "tsan", ["data race"]),
    ("last_block", "tsan", ["data race", "last_block_sums"]),
]

CASES = sorted({case for case, *_ in REPORTED + REVEALED + SANITIZED})
SCHEDULES = [
    {"order": order, "fill": fill, "async": moment, "seed": 7}
    for order in ("forward", "reverse", "random")
    for fill in ("00", "ff")
    for moment in ("wait", "issue")
]


@pytest.mark.parametrize("case, words", REPORTED, ids=[case for case, _ in REPORTED])
def test_fault_is_reported(programs, case, words):
    result = programs.run("plain", "faults", case, "faulty")
    assert result.code == 3, result.output
    for word in words:
        assert word in result.output


@pytest.mark.parametrize("case", ["shared_write", "shared_index"])
def test_redzones_tell_without_a_sanitizer(programs, case):
    result = programs.run("plain", "faults", case, "faulty")
    assert result.code == 3 and "shared array 'tile' was written out of bounds" in result.output, result.output


@pytest.mark.parametrize("case, one, other", REVEALED, ids=[case for case, *_ in REVEALED])
def test_fault_changes_the_result(programs, case, one, other):
    first, second = (programs.run("plain", "faults", case, "faulty", **schedule) for schedule in (one, other))
    assert first.code == second.code == 0
    assert first.bits != second.bits


@pytest.mark.sanitizer
@pytest.mark.parametrize("case, build, words", SANITIZED, ids=[f"{case}-{build}" for case, build, _ in SANITIZED])
def test_fault_is_found_by_a_sanitizer(programs, case, build, words):
    result = programs.run(build, "faults", case, "faulty")
    assert result.code == 66, result.output
    for word in words:
        assert word in result.output


@pytest.mark.sanitizer
@pytest.mark.parametrize("build", ["asan", "tsan"])
@pytest.mark.parametrize("case", [case for case, _ in REPORTED])
def test_leaving_a_failed_block_is_clean_under_sanitizers(programs, build, case):
    assert programs.run(build, "faults", case, "faulty").code == 3


@pytest.mark.parametrize("case", CASES)
def test_corrected_twin_is_clean(programs, case):
    results = [programs.run("plain", "faults", case, **schedule) for schedule in SCHEDULES]
    assert all(result.code == 0 for result in results), results
    if case != "misaligned":  # prints nothing: its fault is in the access itself
        assert len({result.bits for result in results}) == 1


@pytest.mark.sanitizer
@pytest.mark.parametrize("build", ["asan", "tsan"])
@pytest.mark.parametrize("case", CASES)
def test_corrected_twin_is_clean_under_sanitizers(programs, build, case):
    result = programs.run(build, "faults", case)
    assert result.code == 0 and "done" in result.output, result.output
