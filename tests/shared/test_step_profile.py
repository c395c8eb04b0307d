"""`python -m benchmarks.step --profile` counts a profile's calls correctly."""

from benchmarks.step import counts


def test_a_profile_says_what_launches_and_what_waits():
    text = counts(
        {"aten::mm": 7, "aten::nonzero": 2, "cudaLaunchKernelExC": 5, "cuLaunchKernelEx": 1, "cudaMemcpyAsync": 3}
    )
    assert (
        text == "torch operations 9; kernel launches 6; calls that wait for a card: aten::nonzero 2, cudaMemcpyAsync 3"
    )


def test_a_profile_without_waiting_calls_says_none():
    assert counts({"aten::mm": 1}).endswith("calls that wait for a card: none")
