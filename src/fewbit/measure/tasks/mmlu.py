"""MMLU (Hendrycks et al. 2020), five examples before each question, in the prompt of its authors' script.

The score is the mean over all questions, not over subjects. Two ways to find the model's answer, which give different
numbers: the likeliest of the four letters, or the first letter of what it generates (TensorRT-LLM's mmlu.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fewbit.errors import RecipeError
from fewbit.measure.tasks.task import Task

Scorer = Literal["loglikelihood", "generate"]


def mmlu(folder: Path, scorer: Scorer = "loglikelihood", shots: int = 5) -> Task:
    """The task.

    Args:
        folder: Holds test.jsonl and dev.jsonl (or .jsonl.gz) with rows of `subject`, `question`, `choices`, `answer`.
        scorer: How the answer is found.
        shots: Examples of the same subject, from dev.

    Raises:
        RecipeError: A file is missing.
    """
    return Task(
        name="mmlu" if scorer == "loglikelihood" else "mmlu_generate",
        kind="multiple_choice" if scorer == "loglikelihood" else "generation",
        file=_file(folder, "test"),
        examples=_file(folder, "dev"),
        shots=shots,
        first_shots=True,
        baseline=0.25,
        # two spaces, as the original has it: each word of a subject is put behind one
        preamble="The following are multiple choice questions (with answers) about  {group}.\n\n",
        delimiter="\nAnswer: ",
        between="\n\n",
        length="none",
        letters=True,
        max_tokens=2,
        match="begins",
        fields={"query": "question", "gold": "answer", "category": "subject"},
    )


def _file(folder: Path, name: str) -> Path:
    for file in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
        if file.is_file():
            return file
    raise RecipeError(f"{folder}: no {name}.jsonl or {name}.jsonl.gz; MMLU needs test and dev")
