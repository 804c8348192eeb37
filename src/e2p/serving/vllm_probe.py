"""What has to be known of a vLLM server before users are sent there: its model, its window, and two things it may lack.

*The same embeddings.* A prompt as embeddings must be answered as the same prompt as token ids. A server with another
checkpoint, or a family whose scaling of embeddings is not understood, would answer nonsense without any error.

*Embeddings told apart.* A server keeps the keys and values of prompts that it has read. Where it knows them by token
ids alone, a prompt as embeddings (whose ids are all the same) is answered by another one's keys and values: one user's
answer to another user. vLLM puts a hash of the embeddings into these keys; other versions and caches need not.

Both are seen by two prompts of other tokens but the last, so long that all but the last are kept.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import torch

from e2p.model.token_table import TokenTable
from e2p.serving.engine import EngineError, Sampling
from e2p.serving.vllm_wire import embeds_body, how, ids_body

_LENGTHS = (257, 129, 65, 33, 17, 9)  # one more than whole blocks of any usual size
_TOP = 5
_CLOSE = 0.3  # nats between two computations of one distribution, bfloat16's noise and more

Ask = Callable[[bytes], Awaitable[bytes]]


class Findings(NamedTuple):
    """Of a server.

    Args:
        tells: it tells embeddings apart in what it keeps.
    """

    tells: bool


async def probe(ask: Ask, model: str, table: TokenTable, window: int) -> Findings:
    """Ask a server four short questions of no user.

    Args:
        ask: posts a body to /v1/completions and gives the response's; raises EngineError.
        model: its name there.
        table: the backbone's embeddings.
        window: longest prompt and answer there.

    Raises:
        EngineError: it does not take prompts as embeddings, or embeds tokens otherwise.
    """
    length = next((each for each in _LENGTHS if each < window), 1)
    generator = torch.Generator().manual_seed(0)
    # Not from the end of the table: rows there may be padding that no tokenizer names and a server cuts off.
    prompts = torch.randint(len(table.tokenizer) // 2, (2, length), generator=generator)
    prompts[1, -1] = prompts[0, -1]
    fields = {**how(Sampling(1, 0.0, logprobs=_TOP), model, (), "", chat=False), "stream": False}
    by_ids = [_distribution(await ask(ids_body(ids, fields))) for ids in prompts.tolist()]
    by_embeds = [_distribution(await ask(embeds_body(table.embed(ids), fields))) for ids in prompts]
    apart = _distance(*by_ids)
    if _distance(by_ids[0], by_embeds[0]) > max(_CLOSE, apart / 2):
        raise EngineError(
            "expected a vLLM server that answers a prompt as embeddings like the same one as token ids, got another "
            "answer; serve the checkpoint that the adapters' backbone names there"
        )
    return Findings(tells=_distance(by_ids[1], by_embeds[1]) < min(_distance(by_embeds[0], by_embeds[1]), _CLOSE))


def _distribution(body: bytes) -> dict[str, float]:
    try:
        logprobs = json.loads(body)["choices"][0]["logprobs"]["top_logprobs"][0]
        return {str(token): float(value) for token, value in logprobs.items()}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise EngineError(
            f"expected log-probabilities from the vLLM server, got {body[:80]!r}; vLLM 0.32 says them so"
        ) from None


def _distance(a: dict[str, float], b: dict[str, float]) -> float:
    """Mean difference in nats over the likeliest tokens of both; one without a name is below all that have one."""
    floors = [min(each.values(), default=0.0) for each in (a, b)]
    tokens = a.keys() | b.keys()
    return sum(abs(a.get(t, floors[0]) - b.get(t, floors[1])) for t in tokens) / max(1, len(tokens))
