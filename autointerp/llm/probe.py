"""Ask a server two tiny questions to learn its capabilities, before a judge's protocol is chosen."""

from __future__ import annotations

from autointerp.llm.client import LlmClient
from autointerp.llm.exchange import AnswerFailed, Request
from autointerp.llm.prompts import conversation
from autointerp.llm.servers import Capabilities

_WORD_SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string", "enum": ["yes"]}},
    "required": ["word"],
    "additionalProperties": False,
}


async def probe_capabilities(client: LlmClient) -> Capabilities:
    """Ask the two questions, unless their answers are known from this client's requests or the cache.

    The first has the form of the ``single`` protocol, because a model that thinks first gives log-probabilities, but
    not of the label. The second forces a word that no model would answer.

    :raises UserError: no server answers, or the key is refused.
    """
    await client.check()
    client.load_capabilities()
    known = client.capabilities
    if known.label_first is None:
        known.label_first = await _gives_label_first(client)
    if known.json_schema is None:
        asked = Request(conversation("probe").messages(question="word"), max_tokens=200, json_schema=_WORD_SCHEMA)
        try:
            await client.ask_anew(asked, lambda answer: answer)
        except AnswerFailed:
            known.json_schema = False
        known.json_schema = bool(known.json_schema)  # still unknown after an answer that was cut off
    await client.store_capabilities()
    return known


async def _gives_label_first(client: LlmClient) -> bool:
    asked = Request(conversation("probe").messages(question="label"), max_tokens=4, logprobs=20, may_be_cut=True)
    try:
        _, answer = await client.ask_anew(asked, lambda answer: answer)
    except AnswerFailed:
        return False
    first = answer.tokens[0] if answer.tokens else answer.text[:1]
    return first.strip() in ("0", "1")
