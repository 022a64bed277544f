"""A model's chat template together with the values that the run's config fixes for it.

Invariant: the text of a conversation depends on the messages and the config alone. In particular, `strftime_now` tells
a template the config's `model.template_date` and never the clock's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from typing import TYPE_CHECKING, Any, Self

from aft_ray.config.run import ConfigError, ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]  # "role" and "content"
# The roles of a message that tells the model how to answer.
SYSTEM_ROLES = ("system", "developer")
# Words that stand for messages when a template is examined.
_QUESTION, _SYSTEM_PROMPT = "QUESTION", "INSTRUCTIONS"


class TemplateRefusal(ValueError):
    """The chat template cannot render these messages, for instance because it does not know a role."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The chat template of a tokenizer, with its values.

    Attributes:
        values: what the template sees besides the messages, by name.
        system_prompt: the system message of conversations that have none; None: none is added.
    """

    tokenizer: PreTrainedTokenizerBase
    values: Mapping[str, Any]
    system_prompt: str | None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> Self | None:
        """The template as a run uses it; None when the tokenizer has none, or with `model.chat_template=never`.

        Raises:
            ConfigError: the template does not use a value that the config has for it, has no system role for the
                config's system prompt, or cannot render a question.
        """
        if model.chat_template == "never" or not tokenizer.chat_template:
            for key, way_out in (
                ("chat_template_kwargs", ""),
                ("system_prompt", ", or write it into the task's prompt"),
            ):
                if getattr(model, key):
                    raise ConfigError(
                        f"model.{key} is for a chat template, and the tokenizer of {model.name} has none; remove it"
                        f"{way_out}"
                    )
            return None
        template = cls(tokenizer, template_values(model), model.system_prompt)
        template._check(model)
        return template

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Args:
            messages: Their first one takes the place of the config's system prompt if it is a system message.
            add_generation_prompt: Whether the text ends with the beginning of the assistant's turn.

        Raises:
            TemplateRefusal: the template does not take the messages.
        """
        return str(self._apply(messages, add_generation_prompt, tokenize=False))

    def token_ids(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation, up to the beginning of the assistant's turn. Raises TemplateRefusal."""
        # transformers 5 returns a BatchEncoding by default.
        return list(self._apply(messages, True, return_dict=False))

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool, **options: Any) -> Any:
        from jinja2 import TemplateError

        has_system = bool(messages) and messages[0]["role"] in SYSTEM_ROLES
        if self.system_prompt is not None and not has_system:
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **options,
                **self.values,
            )
        except TemplateError as error:
            raise TemplateRefusal(f"the model's chat template refuses these messages: {error}") from error

    def _check(self, model: ModelConfig) -> None:
        try:
            names = names_in_template(str(self.tokenizer.get_chat_template()))
        except ValueError as error:  # several templates, none of which is the default
            raise ConfigError(
                f"the tokenizer of {model.name} has several chat templates and no default one; set "
                f"model.chat_template=never, or give the tokenizer one template"
            ) from error
        if unused := sorted(model.chat_template_kwargs.keys() - names):
            raise ConfigError(
                f"model.chat_template_kwargs has {', '.join(unused)}, which the chat template of {model.name} never "
                f"uses; remove it, or correct its name"
            )
        question = {"role": "user", "content": _QUESTION}
        without_system_prompt = type(self)(self.tokenizer, self.values, None)
        try:
            without_system_prompt.render([question])
        except TemplateRefusal as error:
            raise ConfigError(
                f"the chat template of {model.name} cannot render a question ({error.__cause__}); set what it needs "
                f"in model.chat_template_kwargs, or model.chat_template=never"
            ) from error
        if self.system_prompt is not None:
            system = {"role": "system", "content": _SYSTEM_PROMPT}
            try:
                understood = _SYSTEM_PROMPT in without_system_prompt.render([system, question])
            except TemplateRefusal:
                understood = False
            if not understood:
                raise ConfigError(
                    f"model.system_prompt needs a chat template with a system role, and that of {model.name} has none; "
                    f"write the text into the task's prompt"
                )


def template_values(model: ModelConfig) -> dict[str, Any]:
    """What a chat template sees besides the messages: the config's values, and the function `strftime_now`.

    transformers gives templates a `strftime_now` that reads the clock. A value of the same name takes its place.
    """
    return {**model.chat_template_kwargs, "strftime_now": _frozen_clock(model.template_date or date.today())}


def _frozen_clock(day: date) -> Callable[[str], str]:
    """A `strftime_now` for which it is always the beginning of `day`."""
    return datetime.combine(day, time()).strftime


def names_in_template(template: str) -> set[str]:
    """The names of variables, functions and tags that a Jinja template contains."""
    from jinja2 import Environment

    names: set[str] = set()
    previous = ""
    for _, kind, value in Environment().lex(template):
        if kind == "name" and previous != ".":  # a name after a dot is an attribute
            names.add(value)
        if kind != "whitespace":
            previous = value
    return names
