"""Options evaluate.*: held-out text and how much of it, what the models write, benchmark tasks."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.errors import InputError
from sparsify.params import as_list, check_options, no_duplicates, option

BACKENDS = ("hf", "vllm")


@dataclass
class EvaluateConfig:
    """Perplexity and agreement with the dense model on held-out text, a text of each model, and
    scores on benchmark tasks."""

    num_tokens: int = option(65_536, low=1)
    """held-out tokens scored, at most"""
    batch_size: int = option(8, low=1, speed_only=True)
    """rows per forward on one worker; changes memory and speed only"""

    prompt: str | None = option(None)
    """what every model continues; null = the beginning of the held-out text"""
    num_new_tokens: int = option(48, low=0)
    """tokens that every model writes after the prompt, at most; 0 = none"""
    temperature: float = option(0.7, low=0)
    """of sampling those tokens, with run.seed; 0 = always the likeliest"""

    tasks: list[str] = option([])
    """benchmark tasks, with the dense model beside: names of lm-evaluation-harness, task files
    (.yaml), open-llm-leaderboard-v1 or -v2; docs/evaluate.md"""
    num_fewshot: int | None = option(None, low=0)
    """examples before each question; null = as many as the task says"""
    limit: int | None = option(None, low=1)
    """ask the first so many documents of each task alone: for trying things, marked as partial"""
    apply_chat_template: bool = False
    """ask in the form of a conversation, by the dense model's chat template"""
    task_batch_size: int = option(8, low=1)
    """questions at once; in bfloat16 the last digits of scores depend on it"""
    max_length: int | None = option(None, low=2)
    """tokens of a question with its answer, cut from the left; null = positions of the models"""
    backend: str = option("hf", one_of=BACKENDS)
    """what computes the answers: hf (transformers) or vllm"""
    allow_task_code: bool = False
    """let task files of your own name Python (!function), and tasks run what a model writes"""

    def __post_init__(self) -> None:
        check_options(self, "evaluate")
        no_duplicates("evaluate.tasks", self.tasks)
        for word in self.tasks:
            if not word.strip():
                raise InputError(f"evaluate.tasks={as_list(self.tasks)}: a name is empty")
        chosen = [
            name for name, given in (
                ("num_fewshot", self.num_fewshot is not None), ("limit", self.limit is not None),
                ("apply_chat_template", self.apply_chat_template),
                ("max_length", self.max_length is not None), ("backend", self.backend != "hf"),
                ("allow_task_code", self.allow_task_code),
            ) if given
        ]  # fmt: skip
        if chosen and not self.tasks:
            raise InputError(
                f"evaluate.{chosen[0]}: is of benchmark tasks, and there are none; give "
                "evaluate.tasks=[...] too, or leave it out"
            )


OF_TASKS = (
    "tasks", "num_fewshot", "limit", "apply_chat_template", "task_batch_size", "max_length",
    "backend", "allow_task_code",
)  # fmt: skip
"""options that decide scores on tasks and nothing else"""
