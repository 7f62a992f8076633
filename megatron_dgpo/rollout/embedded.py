"""The engine inside the training process: transformers' own model.

For small models and the quick start. It takes weights and gives samples exactly as a server does.
Shape suffixes: R rows of a batch (one sample each), A rows still generating, P distinct prompts, L padded
prompt length, N new tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_dgpo.data.tokenizer import load_tokenizer
from megatron_dgpo.rollout.engine import SamplingParams, spoken
from megatron_dgpo.rollout.key_values import KeyValues
from megatron_dgpo.rollout.sampling import NonFiniteLogits, TokenChooser, uniforms
from megatron_dgpo.types import Group, Prompt, Sample, VersionSpan

log = logging.getLogger(__name__)

NO_WEIGHTS = -1
COMPACT_SHARE = 0.5
"""Finished rows are dropped from a batch when no more than this share of it is still generating."""
COMPACT_MIN_ROWS = 16
"""Below this, dropping rows costs more than computing them."""
_SCORED_LOGITS = 1 << 26
"""`log_probs` holds about this many logits at once (256 MB)."""


def _ignore(_: int) -> None:
    """Nobody counts."""


class _Batch:
    """The rows that are still generating.

    Args:
        cache: of what comes before each row's last token.
        tokens_A: int64, the last tokens.
        mask_AL: bool; where the rows' tokens are, the last one included.
    """

    def __init__(
        self, cache: KeyValues, tokens_A: torch.Tensor, mask_AL: torch.Tensor, max_new_tokens: int
    ) -> None:
        self.cache = cache
        self.tokens_A = tokens_A
        self.positions_A = mask_AL.sum(1) - 1
        self._length = mask_AL.shape[1]
        self._mask = torch.nn.functional.pad(mask_AL, (0, max_new_tokens), value=True)
        self._padded = not bool(mask_AL.all())

    def add(self, tokens_A: torch.Tensor) -> None:
        """Every row has another token."""
        self.tokens_A = tokens_A
        self.positions_A = self.positions_A + 1
        self._length += 1

    def keep(self, kept: torch.Tensor) -> None:
        """Go on with these rows."""
        self.cache.batch_select_indices(kept)
        self.positions_A, self._mask = self.positions_A[kept], self._mask[kept]
        self._padded = not bool(self._mask.all())

    def attention_mask(self) -> torch.Tensor | None:
        """For the last tokens: None where no row is padded; where every layer sees all tokens, as attention
        takes it, (A, 1, 1, tokens) bool, which spares transformers making it of the (A, tokens) one."""
        if not self._padded:
            return None
        mask = self._mask[:, : self._length]
        return mask[:, None, None] if self.cache.sees_all else mask.long()


class EmbeddedEngine:
    """A Hugging Face causal language model as a rollout engine.

    Threads may share it: one batch is generated at a time, and weights change between batches.

    The model is built from the folder's configuration and holds no usable weights until the first
    `update_weights`; the folder's own weights are not read. A sample depends on the weights, the
    sampling parameters, the prompt's id and tokens and the sample's index, and not on the other
    prompts of the call or on `max_batch_size` (up to float rounding in the model).

    Args:
        model_path: folder with config.json and the tokenizer's files.
        dtype: of weights and activations. Token choice is in float64, log-probs in float32.
        device: where the model lives.
        max_batch_size: rows (samples) that are generated together, at most.

    Raises:
        ValueError: for a max_batch_size below 1, or a tokenizer that cannot be loaded.
        OSError: where the folder has no configuration (from transformers).
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        max_batch_size: int,
    ) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, not {max_batch_size}")
        self._device = torch.device(device)
        self._max_batch_size = max_batch_size
        self._lock = threading.Lock()
        self._version = NO_WEIGHTS
        self._last_version = NO_WEIGHTS
        self._shared: set[str] = set()
        self._changes: Callable[[], int] = lambda: 0
        self._changes_at_update = 0
        config = AutoConfig.from_pretrained(model_path)
        self._tokenizer = load_tokenizer(Path(model_path))
        cuda = [self._device] if self._device.type == "cuda" else []
        # Initialisation draws random numbers; the trainer's generators must not notice.
        with torch.random.fork_rng(devices=cuda), self._device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        model.requires_grad_(False).eval()
        self._model: Any = model
        self._vocab_size = int(config.get_text_config().vocab_size)
        self._max_positions = getattr(config.get_text_config(), "max_position_embeddings", None)

    @property
    def weight_version(self) -> int:
        """The version of the weights in use; -1 before the first complete update."""
        return self._version

    def rest(self) -> None:
        """Nothing to give up: the model is small, or it would not live here."""

    def close(self) -> None:
        """Drop the model; every later call raises RuntimeError."""
        self._model = None

    # --- weights ----------------------------------------------------------------------------------

    def share(self, tensors: Mapping[str, torch.Tensor], changes: Callable[[], int]) -> None:
        """Hold these tensors themselves, by name, in place of copies, where shape, dtype and device are the
        model's. Who owns them may change them in place at any time but during a call, and counts that in
        `changes`: the engine then has the rest of its weights from before, and refuses to generate and to
        score until the next `update_weights`."""
        with self._lock:
            for name, parameter in self._open_model().named_parameters():
                tensor = tensors.get(name)
                if tensor is None or tensor.dtype != parameter.dtype or tensor.device != parameter.device:
                    continue
                if tensor.shape == parameter.shape:
                    parameter.data = tensor
                    self._shared.add(name)
            self._changes = changes
            self._version = NO_WEIGHTS
        log.info("the embedded engine shares %d tensors with the policy", len(self._shared))

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Copy a full set of weights into the model, in place; of shared ones only check that they are these.

        A name of a tied pair stands for both; where both come, they must be equal. After an error
        the engine refuses to generate until an update succeeds.

        Raises:
            KeyError: for unknown, repeated or missing names, listing them.
            ValueError: for a shape that differs, unequal tied tensors, other values than those of a shared
                tensor, or a version below the last one.
        """
        if version < max(self._last_version, 0):
            raise ValueError(f"weight version {version} is older than the engine's {self._last_version}")
        with self._lock:
            self._update(named_tensors, version)

    def _update(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        targets = self._open_model().state_dict()
        self._version = NO_WEIGHTS
        storages = {name: target.data_ptr() for name, target in targets.items()}
        taken: set[str] = set()
        filled: dict[int, str] = {}
        unknown: list[str] = []
        with torch.no_grad():
            for name, tensor in named_tensors:
                if name not in targets or name in taken:
                    unknown.append(name)
                    continue
                if tensor.shape != targets[name].shape:
                    raise ValueError(
                        f"weight {name!r} has shape {tuple(tensor.shape)}, "
                        f"the model expects {tuple(targets[name].shape)}"
                    )
                twin = filled.setdefault(storages[name], name)
                if twin != name and not torch.equal(targets[name], tensor.to(targets[name])):
                    raise ValueError(f"weights {twin!r} and {name!r} are tied by the config but differ")
                if name not in self._shared:
                    targets[name].copy_(tensor)
                elif tensor.data_ptr() != storages[name] and not torch.equal(targets[name], tensor):
                    raise ValueError(f"weight {name!r} is shared with the policy, and other values came")
                taken.add(name)
        missing = [name for name in targets if storages[name] not in filled]
        if unknown or missing:
            raise KeyError(
                f"weights do not fit the model: missing {missing or 'none'}, "
                f"unknown or repeated {unknown or 'none'}"
            )
        self._version = self._last_version = version
        self._changes_at_update = self._changes()

    # --- generation -------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        on_progress: Callable[[int], object] | None = None,
        on_group: Callable[[Group], object] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[Group | None]:
        """`params.n` samples for each prompt, groups in the order of the prompts.

        `on_progress` is called with the number of samples that have ended whenever a batch drops those, and
        at its end, `on_group` with each group that a batch completes. `should_stop` is asked before each
        batch: one that has begun is not given up.

        Raises:
            ValueError: for an empty, too long or out-of-vocabulary prompt, or two prompts of one id.
            RuntimeError: without weights, after `close`, or for logits that are not finite (named by
                prompt id).
        """
        with self._lock:
            self._require_weights()
        self._check(prompts, params)
        rows = [(prompt, i) for prompt in prompts for i in range(params.n)]
        order = sorted(range(len(rows)), key=lambda r: len(rows[r][0].token_ids))
        samples: dict[int, Sample] = {}
        groups: list[Group | None] = [None] * len(prompts)
        for start in range(0, len(order), self._max_batch_size):
            if should_stop is not None and should_stop():
                break
            batch = order[start : start + self._max_batch_size]
            with self._lock:
                drawn = self._generate_batch([rows[r] for r in batch], params, on_progress or _ignore)
            samples.update(zip(batch, drawn, strict=True))
            for p in sorted({r // params.n for r in batch}):
                members = [samples.get(r) for r in range(p * params.n, (p + 1) * params.n)]
                if None not in members:
                    groups[p] = group = Group(prompts[p], [s for s in members if s is not None])
                    if on_group is not None:
                        on_group(group)
        return groups

    @torch.inference_mode()
    def _generate_batch(
        self, rows: list[tuple[Prompt, int]], params: SamplingParams, on_progress: Callable[[int], object]
    ) -> list[Sample]:
        self._require_weights()
        numbers_RN = np.stack([uniforms(params.seed, p.id, i, params.max_new_tokens) for p, i in rows])
        chooser = TokenChooser(params, torch.from_numpy(numbers_RN).to(self._device))
        try:
            self._run([p.token_ids for p, _ in rows], chooser, params.max_new_tokens, on_progress)
        except NonFiniteLogits as error:
            names = sorted({rows[r][0].id for r in error.rows})
            raise RuntimeError(
                f"non-finite logits at response token {chooser.step} of prompt(s) {', '.join(names)} "
                f"with weight version {self._version}"
            ) from error
        return self._samples(rows, chooser, params)

    def _run(
        self,
        prompts: Sequence[tuple[int, ...]],
        chooser: TokenChooser,
        max_new_tokens: int,
        on_progress: Callable[[int], object],
    ) -> None:
        """Choose tokens until every row has ended, dropping finished rows in between: each of them goes on
        costing a forward pass."""
        batch = self._begin(prompts, max_new_tokens)
        while True:
            chooser.choose(self._logits(batch))
            if chooser.step == max_new_tokens:
                break
            share = COMPACT_SHARE if len(chooser.ended_A) >= COMPACT_MIN_ROWS else 0.0
            going_on = int((~chooser.ended_A).sum())
            if going_on <= share * len(chooser.ended_A):
                kept = (~chooser.ended_A).nonzero().squeeze(1)
                on_progress(len(chooser.ended_A) - going_on)
                chooser.keep(kept)
                batch.keep(kept)
            if not going_on:
                break
            batch.add(chooser.chosen_A)
        on_progress(len(chooser.ended_A))  # cut off at the limit

    def _begin(self, prompts: Sequence[tuple[int, ...]], max_new_tokens: int) -> _Batch:
        """Rows whose last prompt token is still to be computed. A prompt that several rows have is computed
        once."""
        distinct = list(dict.fromkeys(prompts))
        ids_PL, mask_PL = self._left_padded(distinct)
        cache = KeyValues(self._model.config.get_text_config())
        if ids_PL.shape[1] > 1:
            before = mask_PL[:, :-1]
            self._model(
                input_ids=ids_PL[:, :-1],
                attention_mask=None if bool(before.all()) else before.long(),
                position_ids=(before.cumsum(1) - 1).clamp(min=0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        place = {prompt: p for p, prompt in enumerate(distinct)}
        rows = torch.tensor([place[prompt] for prompt in prompts], device=self._device)
        cache.batch_select_indices(rows)
        return _Batch(cache, ids_PL[rows, -1], mask_PL[rows], max_new_tokens)

    def _logits(self, batch: _Batch) -> torch.Tensor:
        """(A, V) float32: what follows each row's last token."""
        out = self._model(
            input_ids=batch.tokens_A.unsqueeze(1),
            attention_mask=batch.attention_mask(),
            position_ids=batch.positions_A.unsqueeze(1),
            past_key_values=batch.cache,
            use_cache=True,
        )
        return out.logits[:, -1].float()

    def _left_padded(self, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids, int64 (P, L), and where they are, bool (P, L)."""
        longest = max(map(len, sequences))
        ids_PL = np.zeros((len(sequences), longest), dtype=np.int64)
        mask_PL = np.zeros((len(sequences), longest), dtype=bool)
        for p, sequence in enumerate(sequences):
            ids_PL[p, longest - len(sequence) :] = sequence
            mask_PL[p, longest - len(sequence) :] = True
        return torch.from_numpy(ids_PL).to(self._device), torch.from_numpy(mask_PL).to(self._device)

    def _samples(
        self, rows: list[tuple[Prompt, int]], chooser: TokenChooser, params: SamplingParams
    ) -> list[Sample]:
        stops = set(params.stop_token_ids)
        out = []
        chosen = chooser.tokens_RN[:, : chooser.step].tolist(), chooser.log_probs_RN.tolist()
        for (prompt, index), tokens, log_probs in zip(rows, *chosen, strict=True):
            length = next((t + 1 for t, token in enumerate(tokens) if token in stops), len(tokens))
            out.append(
                Sample(
                    prompt=prompt,
                    index=index,
                    token_ids=tokens[:length],
                    log_probs=log_probs[:length],
                    finish_reason="stop" if tokens[length - 1] in stops else "length",
                    weight_versions=(VersionSpan(self._version, 0, length),),
                )
            )
        said = [spoken(s.token_ids, s.finish_reason) for s in out]
        for sample, text in zip(
            out, self._tokenizer.batch_decode(said, skip_special_tokens=True), strict=True
        ):
            sample.text = text
        return out

    # --- scoring ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def log_probs(self, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score given sequences at temperature 1; entry t is of token t + 1 after tokens 0..t.

        Raises ValueError for an empty or out-of-vocabulary sequence, RuntimeError without weights.
        """
        self._require_weights()
        for k, sequence in enumerate(token_ids):
            self._check_tokens(sequence, f"sequence {k}")
        out: list[list[float]] = [[] for _ in token_ids]
        for batch in self._scoring_batches([len(s) for s in token_ids]):
            longest = max(len(token_ids[k]) for k in batch)
            # Padded on the right: under a causal mask no real token sees the padding.
            ids = torch.tensor(
                [[*token_ids[k], *[0] * (longest - len(token_ids[k]))] for k in batch], device=self._device
            )
            logits = self._model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            targets = ids[:, 1:].unsqueeze(2)
            scores = (logits.gather(2, targets).squeeze(2) - logits.logsumexp(-1)).tolist()
            for k, row in zip(batch, scores, strict=True):
                out[k] = row[: len(token_ids[k]) - 1]
        return out

    def probe(self, token_ids: Sequence[Sequence[int]]) -> dict[str, list[list[float]]]:
        """`log_probs` under the name of the one engine that this rank speaks for."""
        return {"the embedded engine": self.log_probs(token_ids)}

    def _scoring_batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Runs of sequences of similar length within max_batch_size and the logits budget."""
        batch: list[int] = []
        for k in sorted(range(len(lengths)), key=lengths.__getitem__):
            size = (len(batch) + 1) * lengths[k] * self._vocab_size
            if batch and (len(batch) == self._max_batch_size or size > _SCORED_LOGITS):
                yield batch
                batch = []
            batch.append(k)
        if batch:
            yield batch

    # --- checks -----------------------------------------------------------------------------------

    def _open_model(self) -> Any:
        if self._model is None:
            raise RuntimeError("the engine is closed")
        return self._model

    def _require_weights(self) -> None:
        self._open_model()
        if self._version == NO_WEIGHTS:
            raise RuntimeError("the engine has no complete weights: call update_weights first")
        if self._changes() != self._changes_at_update:
            raise RuntimeError(
                f"the policy has changed since weight version {self._version}, and the engine shares its "
                "memory: call update_weights first"
            )

    def _check_tokens(self, tokens: Sequence[int], who: str) -> None:
        if not len(tokens):
            raise ValueError(f"{who} has no tokens")
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= self._vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"{who} has token id {wrong}, outside the vocabulary of {self._vocab_size}")

    def _check(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        seen: set[str] = set()
        for prompt in prompts:
            self._check_tokens(prompt.token_ids, f"prompt {prompt.id!r}")
            if prompt.id in seen:
                raise ValueError(f"prompt id {prompt.id!r} occurs twice in a call: equal samples")
            seen.add(prompt.id)
            total = len(prompt.token_ids) + params.max_new_tokens
            if self._max_positions is not None and total > self._max_positions:
                raise ValueError(
                    f"prompt {prompt.id!r}: {len(prompt.token_ids)} tokens and max_new_tokens "
                    f"{params.max_new_tokens} exceed the model's {self._max_positions} positions"
                )
