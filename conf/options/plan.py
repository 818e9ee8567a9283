"""What the job plan can be told: the run that is planned, as `jobs.prune` is told it, and more."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.params import check_options, option

SHOWS = ("run", "budget", "simulate")


@dataclass
class PlanConfig:
    """What is planned, and what is taken for granted."""

    show: str = option("run", one_of=SHOWS)
    """run: what fits, how long, how much; budget: which model is cheapest over its life; simulate:
    the run on paper with failures. As a first word, budget and simulate stand for this option"""
    out: str | None = None
    """folder for the plan as JSON, and for the simulation's plot; null = none is written"""
    price: float | None = option(None, above=0)
    """money for one GPU and hour, in any currency, over 0; null = GPU-hours alone"""
    memory_share: float = option(0.95, above=0, high=1)
    """share of a card's memory that may be taken; over 0, at most 1"""
    records: list[str] = option([])
    """folders of finished runs on such machines, whose times correct the plan's; [] for none"""
    context_tokens: int = option(4096, low=1)
    """tokens of a request that is served, whose keys and values must be held"""
    batch_size: int = option(32, low=1)
    """requests that are served at once on a card"""
    served_tokens: float = option(1e12, above=0)
    """tokens that the model will be asked for over its life (budget)"""
    trained_tokens: float = option(15e12, above=0)
    """tokens that the dense model was trained on (budget)"""
    loss_gap: float = option(0.03, low=0)
    """nats per token that the recovered model is worse than the dense one (budget)"""
    sparse_speedup: float = option(1.0, low=1, high=2)
    """how many times as fast 2:4 is served; 1 = the engine computes with the zeros (budget)"""
    gpu_mtbf_hours: float = option(50_700.0, above=0)
    """hours of one GPU between two failures (simulate); Llama 3's were 50,700"""
    restart_s: float = option(180.0, low=0)
    """seconds from a failure until steps go on (simulate)"""
    preemptions_per_day: float = option(0.0, low=0)
    """of the whole job (simulate)"""
    wait_s: float = option(600.0, low=0)
    """seconds in the queue after a preemption (simulate)"""
    slow_per_day: float = option(0.0, low=0)
    """times a day that one machine of a hundred becomes slow (simulate)"""
    slow_factor: float = option(1.5, low=1)
    """how many times as long steps take meanwhile (simulate)"""
    slow_hours: float = option(1.0, low=0)
    """hours that it stays so (simulate)"""
    num_runs: int = option(100, low=10)
    """runs on paper for each size (simulate)"""
    most_gpus: int = option(1024, low=8)
    """sizes are 8, 16, 32, ... up to this (simulate)"""

    def __post_init__(self) -> None:
        check_options(self, "plan")
