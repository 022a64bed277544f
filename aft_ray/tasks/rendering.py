"""Turns questions into token ids.

Invariant: prompt and response are tokenized separately, so training sees the same boundary between them as sampling.
The reference response ends with exactly one end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from aft_ray.config.run import RunConfig
from aft_ray.storage.records import Question
from aft_ray.tasks.base import Task
from aft_ray.tasks.chat_template import ChatTemplate, Message
from aft_ray.tasks.response_end import response_ends, response_text, without_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Renderer:
    """Renders the questions of a run.

    Attributes:
        ends: the tokens that end a response.
    """

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Raises:
            ConfigError: no token ends a response, or the chat template cannot be used as the config says.
        """
        self.ends = response_ends(config, tokenizer)
        self._tokenizer = tokenizer
        self._template = ChatTemplate.of(tokenizer, config.model)

    def question(self, task: Task, question: Question) -> tuple[list[int], list[int]]:
        """The token ids of a question's prompt and of its reference response."""
        reference = self._tokenizer(question.reference, add_special_tokens=False)["input_ids"]
        return self.prompt(task.prompt(question)), [*without_end(reference, self.ends.ids), self.ends.reference]

    def prompt(self, text: str, before: Sequence[Message] = ()) -> list[int]:
        """The token ids of a prompt, which becomes a user message if questions are put into the chat template.

        Args:
            before: The messages before the prompt. They are ignored without a chat template.

        Raises:
            TemplateRefusal: the chat template does not take the messages.
        """
        if self._template is None:
            return self.completion(text)
        return self._template.token_ids([*before, {"role": "user", "content": text}])

    def completion(self, text: str) -> list[int]:
        """The token ids of a text as it is, for the model to continue.

        The tokenizer adds its beginning-of-sequence token, if it has one.
        """
        eos = self._tokenizer.eos_token_id
        return without_end(self._tokenizer(text)["input_ids"], () if eos is None else (eos,))

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of a response, without its end token."""
        return response_text(self._tokenizer, token_ids, self.ends.ids)
