"""One sample as requests to SGLang, and what its answers must be."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_dgpo.rollout.engine import SamplingParams, spoken
from megatron_dgpo.types import Prompt, Sample, VersionSpan


class BadAnswer(RuntimeError):
    """A server's answer lacks what a sample needs; not repeated, since it would not get better."""


def request(sample: Response) -> dict[str, Any]:
    """The rest of a sample, as /generate takes it."""
    params, drawn = sample.params, len(sample.token_ids)
    key = f"{params.seed}/{sample.index}/{drawn}/{sample.prompt.id}".encode()
    return dict(
        input_ids=[*sample.prompt.token_ids, *sample.token_ids],
        sampling_params=dict(
            max_new_tokens=params.max_new_tokens - drawn,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k or -1,
            min_p=params.min_p,
            stop_token_ids=list(params.stop_token_ids),
            # With it SGLang looks at no stop token at all.
            ignore_eos=not params.stop_token_ids,
            # Taken by servers with deterministic inference only.
            sampling_seed=int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little") >> 1,
            skip_special_tokens=False,
        ),
        return_logprob=True,
    )


class Response:
    """A sample while it is drawn: more than one answer where a server stopped at an end-of-sequence
    token of the model's own config, which the sampling does not count as one."""

    def __init__(self, prompt: Prompt, index: int, params: SamplingParams) -> None:
        self.prompt, self.index, self.params = prompt, index, params
        self.token_ids: list[int] = []
        self.finish_reason: Any = None
        self.abort_message = ""
        """What the server said of an abort."""
        self._log_probs: list[float] = []
        self._spans: list[VersionSpan] = []

    def add(self, url: str, answer: Any, versions: tuple[int, int], own_names: Mapping[str, int]) -> None:
        """Take an answer; `versions`: the weights in use when it was asked for, and now."""
        who = f"prompt {self.prompt.id!r}, sample {self.index}"
        try:
            ids, meta = answer["output_ids"], answer["meta_info"]
            reason = meta["finish_reason"]["type"]
        except (TypeError, KeyError) as error:
            raise BadAnswer(f"{url}, {who}: not a sample: {answer!r:.300}") from error
        if reason not in ("stop", "length", "abort"):
            raise BadAnswer(f"{url}, {who}: unknown finish reason {reason!r}")
        if reason == "abort":
            self.finish_reason = reason
            self.abort_message = str(meta["finish_reason"].get("message") or "no reason given")
            return
        if not ids:
            raise BadAnswer(f"{url}, {who}: no tokens")
        asked = self.params.max_new_tokens - len(self.token_ids)
        if len(ids) > asked or (reason == "length" and len(ids) < asked):
            given = len(self.prompt.token_ids) + len(self.token_ids)
            raise BadAnswer(f"{url}, {who}: {_wrong_length(len(ids), asked, given)}")
        self._log_probs += log_probs(url, who, ids, meta.get("output_token_logprobs") or [])
        self._spans += _spans(url, who, meta, len(self.token_ids), len(ids), versions, own_names)
        self.token_ids += ids
        stopped_early = reason == "stop" and ids[-1] not in self.params.stop_token_ids
        if not stopped_early:
            self.finish_reason = reason
        elif len(self.token_ids) >= self.params.max_new_tokens:
            self.finish_reason = "length"

    def finished(self, decode: Callable[[Sequence[int]], str]) -> Sample:
        return Sample(
            prompt=self.prompt,
            index=self.index,
            token_ids=self.token_ids,
            log_probs=self._log_probs,
            finish_reason=self.finish_reason,
            weight_versions=tuple(self._spans),
            text=decode(spoken(self.token_ids, self.finish_reason)),
        )


def _wrong_length(got: int, asked: int, given: int) -> str:
    if got > asked:
        return f"{got} tokens, of {asked} asked for"
    return (
        f"finish reason 'length' after {got} of the {asked} tokens asked for, {given} being given: the "
        "sequence is too long for the server's context (context_length) or cache (max_total_tokens, "
        "mem_fraction_static); raise these, or lower rollout.max_new_tokens"
    )


def log_probs(url: str, who: str, ids: Sequence[int], entries: Sequence[Any]) -> list[float]:
    """The log-probs of `ids` out of SGLang's [log-prob, id, text] triples."""
    if len(entries) != len(ids) or [e[1] for e in entries] != list(ids):
        raise BadAnswer(f"{url}, {who}: log-probs of {len(entries)} tokens for {len(ids)}, or of others")
    values = [e[0] for e in entries]
    for t, value in enumerate(values):
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise BadAnswer(f"{url}, {who}: the log-prob of token {t} is {value!r}")
    return values


def _spans(
    url: str,
    who: str,
    meta: dict[str, Any],
    start: int,
    count: int,
    versions: tuple[int, int],
    own_names: Mapping[str, int],
) -> list[VersionSpan]:
    """Which weights drew which of an answer's `count` tokens, the first being the response's `start`.

    Raises BadAnswer for weights that no sync left there, such as those of a server that started anew.
    """
    # Releases before 0.5.21 name the version at the end only; they draw nothing during an update.
    given = meta.get("weight_versions") or [{"version": meta.get("weight_version"), "start": 0, "end": count}]
    spans = []
    for span in given:
        name, low, high = str(span.get("version")), span.get("start"), span.get("end")
        version = str(own_names.get(name)) if own_names else name
        if not str(version).isdecimal() or not versions[0] <= int(version) <= versions[1]:
            raise BadAnswer(
                f"{url}, {who}: drawn with weights of version {name!r}, not {versions[0]} to {versions[1]}"
            )
        spans.append(VersionSpan(int(version), start + low, start + high))
    return spans
