"""Which Hessians all processes factor together, and that it is told from sizes alone."""

from __future__ import annotations

from sparsify.comm import shared_by_all

LLAMA_8B = {"q_proj": 4096, "o_proj": 4096, "gate_proj": 4096, "down_proj": 14336}


def test_what_others_would_wait_for_is_shared() -> None:
    assert shared_by_all(LLAMA_8B, 8) == shared_by_all(LLAMA_8B, 2) == {"down_proj"}
    assert shared_by_all({"down_proj": 14336}, 2) == {"down_proj"}


def test_one_process_shares_nothing() -> None:
    assert shared_by_all(LLAMA_8B, 1) == set()
    assert shared_by_all({"down_proj": 14336}, 1) == set()


def test_narrow_ones_are_not_worth_it() -> None:
    assert shared_by_all({"gate_proj": 4096}, 8) == set()


def test_as_many_as_processes_are_dealt_out_whole() -> None:
    experts = {f"experts.{index}": 14336 for index in range(8)}
    assert shared_by_all(experts, 8) == set()
    assert shared_by_all(dict(list(experts.items())[:7]), 8) == set(list(experts)[:7])
