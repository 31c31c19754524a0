"""Read the files of a dataset: prompt file, system prompt file and problems; no tokenizer is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distill.config.template import Template
from distill.data.columns import TextColumn
from distill.data.conversations import Chat, chat_of, has_system, stored_messages
from distill.data.files import read_text
from distill.data.grading import THINK_TAGS
from distill.data.sources import keyed, load_problems
from distill.data.table import Problems
from distill.errors import UserError
from distill.types import Problem

if TYPE_CHECKING:
    from distill.config import DatasetConfig


def read_datasets(
    datasets: Sequence[DatasetConfig],
    key: str,
    trace_column: str | None = None,
    trace_required: bool = True,
    extra: Sequence[TextColumn] = (),
    reference: TextColumn | None = None,
    think_tags: tuple[str, str] = THINK_TAGS,
) -> Iterator[tuple[DatasetConfig, PromptFormat, Problems]]:
    """Yield each dataset with the contents of its prompt files and its problems.

    ``key``: the datasets' configuration key, for error messages. The other arguments: see ``load_problems``. Raises
    UserError for invalid files, and for a row with its own system message if the dataset has a system_prompt_file.
    """
    for dataset_key, dataset in keyed(datasets, key):
        prompt_format = PromptFormat.of(dataset, dataset_key)
        problems = load_problems(dataset, dataset_key, trace_column, trace_required, extra, reference, think_tags)
        if prompt_format.system:
            _check_system(problems, f"{dataset_key}.system_prompt_file", dataset.system_prompt_file or "")
        yield dataset, prompt_format, problems.with_system(prompt_format.system)


def _check_system(problems: Problems, key: str, path: str) -> None:
    """Raise UserError if a conversation has a system message, in addition to that of the file ``path``."""
    for i, problem in enumerate(problems if problems.has_conversations else ()):
        if problem.messages and has_system(stored_messages(problem.messages)):
            raise UserError(
                f"{key}={path} gives a system message, but the conversation in {problems.location(i)} has its own",
                f"set {key} to null, or remove the system messages from the conversations",
                key=key,
                value=path,
            )


def read_prompt_file(path: str, key: str) -> Template:
    """Read a prompt file: the template of the user message, in which ``{}`` is replaced by the problem.

    ``key``: the configuration key of ``path``. Raises UserError unless the file contains exactly one ``{}``; a second
    ``{}`` is usually a ``\\boxed{}`` that was meant literally.
    """
    template = Template(read_text(path, key), ("",), key, path)
    count = template.count("")
    if count == 0:
        raise UserError(f"{key}={path} contains no {{}}", "write {} in place of the problem", key=key, value=path)
    if count > 1:
        fix = "keep one {} for the problem and write literal braces as {{}}"
        raise UserError(f"{key}={path} contains {count} placeholders {{}}", fix, key=key, value=path)
    return template


@dataclass(frozen=True)
class PromptFormat:
    """Contents of the prompt file and the system prompt file of one dataset."""

    prompt: Template | None
    """Template of the user message; None: the user message is the problem."""
    system: str | None
    """System message; None: no system message."""

    @classmethod
    def of(cls, dataset: DatasetConfig, key: str) -> PromptFormat:
        """Read the files of ``dataset``; ``key``: its configuration key, for messages."""
        prompt_file, system_file = dataset.prompt_file, dataset.system_prompt_file
        return cls(
            read_prompt_file(prompt_file, f"{key}.prompt_file") if prompt_file else None,
            read_text(system_file, f"{key}.system_prompt_file") if system_file else None,
        )

    def chat(self, problem: Problem) -> Chat:
        """Return the conversation with the prompt for ``problem``.

        In a conversation of several messages, the prompt file applies to the text of the last user message.
        """
        return chat_of(
            problem, self.prompt.fill({"": problem.text}) if self.prompt else problem.text, self.system or ""
        )
