"""What the hot loops of the mma.sync kernels may take. sass_report.py holds them to it."""

from __future__ import annotations

MANY_ROWS = "decode, many rows"  # the second loop of decoding

# Instructions per HMMA, by (pass, head dim, memory class). 64 x 64 tiles, whose warps have 16 rows,
# need more than 128 x 64 ones: forward 128 and 256, small.
BUDGETS: dict[tuple[str, int, str], float] = {
    ("forward", 32, "large"): 6.6,
    ("forward", 32, "small"): 6.3,
    ("forward", 64, "large"): 4.05,
    ("forward", 64, "small"): 4.05,
    ("forward", 96, "large"): 3.25,
    ("forward", 96, "small"): 3.25,
    ("forward", 128, "large"): 2.75,
    ("forward", 128, "small"): 3.15,
    ("forward", 192, "large"): 2.6,
    ("forward", 192, "small"): 2.6,
    ("forward", 256, "large"): 2.4,
    ("forward", 256, "small"): 2.5,
    ("backward", 32, "large"): 4.4,
    ("backward", 32, "small"): 4.4,
    ("backward", 64, "large"): 3.05,
    ("backward", 64, "small"): 3.05,
    ("backward", 96, "large"): 2.65,
    ("backward", 96, "small"): 2.65,
    ("backward", 128, "large"): 2.45,
    ("backward", 128, "small"): 2.75,
    ("backward", 192, "large"): 2.5,
    ("backward", 192, "small"): 2.75,
    ("backward", 256, "large"): 2.5,
    ("backward", 256, "small"): 3.1,
    ("decode", 32, "large"): 27.85,
    ("decode", 32, "small"): 27.85,
    ("decode", 64, "large"): 17.3,
    ("decode", 64, "small"): 16.55,
    ("decode", 96, "large"): 11.8,
    ("decode", 96, "small"): 11.3,
    ("decode", 128, "large"): 10.1,
    ("decode", 128, "small"): 9.7,
    ("decode", 192, "large"): 7.65,
    ("decode", 192, "small"): 7.45,
    ("decode", 256, "large"): 6.55,
    ("decode", 256, "small"): 6.35,
    (MANY_ROWS, 32, "large"): 15.15,
    (MANY_ROWS, 32, "small"): 15.15,
    (MANY_ROWS, 64, "large"): 9.05,
    (MANY_ROWS, 64, "small"): 9.05,
    (MANY_ROWS, 96, "large"): 6.35,
    (MANY_ROWS, 96, "small"): 6.35,
    (MANY_ROWS, 128, "large"): 5.5,
    (MANY_ROWS, 128, "small"): 5.5,
    (MANY_ROWS, 192, "large"): 4.35,
    (MANY_ROWS, 192, "small"): 4.35,
    (MANY_ROWS, 256, "large"): 3.75,
    (MANY_ROWS, 256, "small"): 3.75,
    ("prefill", 32, "large"): 8.5,
    ("prefill", 32, "small"): 8.15,
    ("prefill", 64, "large"): 5.5,
    ("prefill", 64, "small"): 5.5,
    ("prefill", 96, "large"): 3.85,
    ("prefill", 96, "small"): 3.85,
    ("prefill", 128, "large"): 3.55,
    ("prefill", 128, "small"): 4.7,
    ("prefill", 192, "large"): 3.15,
    ("prefill", 192, "small"): 3.15,
    ("prefill", 256, "large"): 2.85,
    ("prefill", 256, "small"): 3.35,
    # With scores, on the path where none of them is set.
    ("forward scores", 64, "large"): 4.5,
    ("forward scores", 128, "large"): 3.2,
    ("forward scores", 256, "large"): 2.55,
    ("backward scores", 64, "large"): 3.25,
    ("backward scores", 128, "large"): 2.5,
    ("backward scores", 256, "large"): 2.5,
}
# The backward of the large class with softcap alone, by head dim and architecture: at most 1.6,
# 1.35 and 1.2 times the plain kernel's, whose loop is longer for 9.0.
CAP_BUDGETS: dict[tuple[int, str], float] = {
    (64, "sm_80"): 4.65,
    (128, "sm_80"): 3.12,
    (256, "sm_80"): 2.77,
    (64, "sm_90"): 4.65,
    (128, "sm_90"): 3.15,
    (256, "sm_90"): 2.79,
}
# The forward of the large class on sm_80 with one option alone, by option and head dim. With
# softcap or a bias it takes what FlashAttention-2 takes without; ALiBi has two multiply-adds for
# every score.
OPTION_BUDGETS: dict[tuple[str, int], float] = {
    ("softcap", 64): 6.65,
    ("softcap", 128): 4.3,
    ("softcap", 256): 3.15,
    ("ALiBi", 64): 5.85,
    ("ALiBi", 128): 4.05,
    ("ALiBi", 256): 3.0,
    ("bias fp32", 64): 6.15,
    ("bias fp32", 128): 4.4,
    ("bias fp32", 256): 3.2,
    ("bias of 16 bits", 64): 6.7,
    ("bias of 16 bits", 128): 4.5,
    ("bias of 16 bits", 256): 3.3,
}
# Local-memory instructions of a hot loop, by the name's beginning: none but these. The registers of
# 256 columns are all in use before a score is looked at.
LOCAL_LIMITS = {
    "decode scores d256": 14,
    f"{MANY_ROWS} scores d256": 1,
    "backward scores d256 small": 2,
}
DETERMINISTIC_EXTRA = 0.2  # waiting for a turn and passing it on

# Where an A100's shared memory must keep up with its tensor cores: percent of their time.
SHARED_LIMITS: dict[tuple[str, int, str], float] = {
    ("backward", 64, "large"): 100.0,
    ("backward", 128, "large"): 100.0,
}
