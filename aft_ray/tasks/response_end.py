"""The tokens that end a response: at which sampling stops, and with which references are ended.

Invariant: sampling, training, evaluation and the service use the ids that `response_ends` gives. They include every id
at which vLLM stops by itself, because vLLM always adds those of the model's generation config.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aft_ray.config.run import ConfigError, RunConfig
from aft_ray.storage.model_files import load_model_config
from aft_ray.storage.run_dir import local_model
from aft_ray.tasks.chat_template import ChatTemplate, TemplateRefusal, template_values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A word that stands for the response when the end of the assistant's turn is looked for.
_RESPONSE = "RESPONSE"


@dataclass(frozen=True, slots=True)
class ResponseEnds:
    """The tokens that end a response.

    Attributes:
        ids: every token at which sampling stops, in ascending order.
        reference: the one of them with which references end.
    """

    ids: tuple[int, ...]
    reference: int


def response_ends(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> ResponseEnds:
    """The end tokens of the run's model.

    They are the tokenizer's end-of-sequence token, those of the model's generation config, and the token with which
    the chat template ends the assistant's turn. References end like the assistant's turn if questions are put into the
    template, and with the tokenizer's end-of-sequence token otherwise.

    Raises:
        ConfigError: there is no such token, or the chat template cannot be used as the config says.
    """
    template = ChatTemplate.of(tokenizer, config.model)
    turn_end = _turn_end(template) if template else None
    eos: int | None = tokenizer.eos_token_id
    reference = turn_end if turn_end is not None else eos
    if template is None and tokenizer.chat_template:
        # The model may end its responses as in a conversation although it is not asked in one.
        turn_end = _turn_end(ChatTemplate(tokenizer, template_values(config.model), None))
    found = {id for id in (eos, turn_end, *_generation_eos(config)) if id is not None and 0 <= id < len(tokenizer)}
    if not found:
        raise ConfigError("the model's tokenizer has no end-of-sequence token; a response could never end")
    return ResponseEnds(tuple(sorted(found)), min(found) if reference is None else reference)


def response_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], end_ids: Collection[int]) -> str:
    """The text of a response. An end token does not belong to it, whether or not the tokenizer calls it special."""
    return str(tokenizer.decode(without_end(token_ids, end_ids), skip_special_tokens=True))


def without_end(token_ids: Sequence[int], end_ids: Collection[int]) -> list[int]:
    """The tokens of a response without the end tokens after its text."""
    length = len(token_ids)
    while length and token_ids[length - 1] in end_ids:
        length -= 1
    return list(token_ids[:length])


def _turn_end(template: ChatTemplate) -> int | None:
    """The token that follows an assistant's message in the template; None when that is not a token of its own."""
    messages = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": _RESPONSE}]
    try:
        _, found, after = template.render(messages, add_generation_prompt=False).rpartition(_RESPONSE)
    except (TemplateRefusal, ValueError):  # a template for questions alone, or several without a default
        return None
    if not found:
        return None
    tokenizer = template.tokenizer
    control = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    after_ids = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"]
    return int(after_ids[0]) if after_ids and after_ids[0] in control else None


def _generation_eos(config: RunConfig) -> list[int]:
    """The end-of-sequence ids of generation_config.json; without that file, of the model's config, as in vLLM."""
    from transformers import GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(local_model(config.model.name))
    except OSError:
        generation = GenerationConfig.from_model_config(load_model_config(config))
    ids = generation.eos_token_id
    return [] if ids is None else [int(id) for id in (ids if isinstance(ids, list | tuple) else [ids])]
