"""The embedded engine against independent forward passes of the same transformers model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from megatron_dgpo.rollout.embedded import EmbeddedEngine
from megatron_dgpo.rollout.engine import Engine, SamplingParams
from megatron_dgpo.types import Group, Prompt

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
EOS, PAD = 0, 1
VOCAB = 2 + len(LETTERS)


def save_folder(path: Path, *, tied: bool = False, family: type = Qwen2Config) -> Path:
    """A folder with config and tokenizer; the engine must not need the weights."""
    ids = {"<eos>": EOS, "<pad>": PAD, **{c: i for i, c in enumerate(LETTERS, 2)}}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(path)
    family(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        # A config's end of sequence must have no effect: only SamplingParams ends a response.
        eos_token_id=5,
    ).save_pretrained(path)
    return path


def random_model(folder: Path, seed: int) -> PreTrainedModel:
    """A model whose next-token distributions are uneven (2.5 of 3.6 nats) and depend on the context."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_engine(
    folder: Path, model: PreTrainedModel | None = None, max_batch_size: int = 64, version: int = 1
) -> EmbeddedEngine:
    engine = EmbeddedEngine(folder, dtype=torch.float32, device="cpu", max_batch_size=max_batch_size)
    if model is not None:
        engine.update_weights(model.named_parameters(), version)
    return engine


def make_prompts(count: int, shortest: int = 1, longest: int = 12) -> list[Prompt]:
    generator = torch.Generator().manual_seed(5)
    prompts = []
    for i in range(count):
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        ids = torch.randint(2, VOCAB, (length,), generator=generator).tolist()
        prompts.append(Prompt(f"data:{i}", tuple(ids), "", ""))
    return prompts


def tokens_of(groups: list[Group]) -> list[list[list[int]]]:
    return [[s.token_ids for s in g.samples] for g in groups]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path):
    return random_model(folder, seed=1)


@pytest.fixture(scope="module")
def engine(folder: Path, model) -> EmbeddedEngine:
    return make_engine(folder, model)


@torch.no_grad()
def full_forward_log_probs(model, prompt: Prompt, response: list[int], temperature: float) -> torch.Tensor:
    """One unbatched pass in float64 without a cache."""
    ids = torch.tensor([[*prompt.token_ids, *response]])
    logits = model.double()(ids, use_cache=False).logits[0] / temperature
    first = len(prompt.token_ids) - 1
    at = logits.log_softmax(-1)[first:-1]
    model.float()
    return at.gather(1, torch.tensor(response)[:, None])[:, 0]


def test_engine_follows_the_protocol(engine: EmbeddedEngine) -> None:
    assert isinstance(engine, Engine)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(20, n=3, seed=4),
        SamplingParams(20, temperature=0.7, top_p=0.8, n=3, seed=4, stop_token_ids=(EOS, 9)),
        SamplingParams(20, temperature=1.5, top_k=5, min_p=0.1, n=2, seed=4),
        SamplingParams(20, temperature=0.0),
    ],
    ids=["plain", "top_p", "top_k_min_p", "greedy"],
)
def test_log_probs_equal_a_full_forward_pass(engine, model, params: SamplingParams) -> None:
    """Unfiltered log-probs at the sampling temperature, with padding, cache and dropped rows."""
    worst = 0.0
    for group in engine.generate(make_prompts(9), params):
        for sample in group.samples:
            expected = full_forward_log_probs(
                model, group.prompt, sample.token_ids, params.temperature or 1.0
            )
            assert len(sample.log_probs) == len(sample.token_ids)
            worst = max(worst, float((torch.tensor(sample.log_probs) - expected).abs().max()))
    assert worst < 1e-5


def test_scored_log_probs_equal_a_full_forward_pass(folder, model) -> None:
    engine = make_engine(folder, model, max_batch_size=3)
    sequences = [list(p.token_ids) for p in make_prompts(8)] + [[7]]
    for ids, scores in zip(sequences, engine.log_probs(sequences), strict=True):
        expected = full_forward_log_probs(model, Prompt("x", (ids[0],), "", ""), ids[1:], 1.0)
        assert len(scores) == len(ids) - 1
        torch.testing.assert_close(torch.tensor(scores).double(), expected, atol=1e-5, rtol=0)


def test_greedy_equals_transformers_own_greedy(engine, model) -> None:
    for group in engine.generate(make_prompts(6), SamplingParams(24, temperature=0.0)):
        ids = torch.tensor([group.prompt.token_ids])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=-1
        )
        assert group.samples[0].token_ids == out[0, ids.shape[1] :].tolist()


def test_samples_do_not_depend_on_calls_order_or_batch_size(folder, model) -> None:
    prompts = make_prompts(16)
    params = SamplingParams(24, temperature=0.9, top_p=0.95, n=3, seed=7, stop_token_ids=(EOS, 11, 12))
    engine = make_engine(folder, model)
    together = tokens_of(engine.generate(prompts, params))
    split = engine.generate(prompts[:5], params) + engine.generate(prompts[5:], params)
    backwards = engine.generate(prompts[::-1], params)[::-1]
    small = make_engine(folder, model, max_batch_size=4)
    assert len({tuple(t) for group in together for t in group}) > 40  # the samples do differ
    assert tokens_of(split) == together
    assert tokens_of(backwards) == together
    assert tokens_of(small.generate(prompts, params)) == together
    assert tokens_of(engine.generate(prompts, params)) == together


def test_a_longer_limit_or_more_samples_extend_the_same_samples(engine) -> None:
    prompts = make_prompts(3)
    short = tokens_of(engine.generate(prompts, SamplingParams(5, n=2, seed=1)))
    long = tokens_of(engine.generate(prompts, SamplingParams(15, n=4, seed=1)))
    assert [[s[:5] for s in group[:2]] for group in long] == short


def test_seed_prompt_id_and_index_each_change_the_sample(engine) -> None:
    ids = (3, 4, 5)
    base = SamplingParams(20, n=2, seed=1)
    first, second = tokens_of(engine.generate([Prompt("a", ids, "", "")], base))[0]
    other_id = tokens_of(engine.generate([Prompt("b", ids, "", "")], base))[0][0]
    other_seed = tokens_of(engine.generate([Prompt("a", ids, "", "")], SamplingParams(20, seed=2)))[0][0]
    assert len({tuple(t) for t in (first, second, other_id, other_seed)}) == 4


def test_generation_leaves_the_global_generator_alone(folder, model) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    make_engine(folder, model).generate(make_prompts(2), SamplingParams(3))
    assert torch.equal(torch.get_rng_state(), before)


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic over cells with an expectation of at least 5, the others pooled, and the
    degrees of freedom."""
    expected = probs * counts.sum()
    big = expected >= 5
    counts = torch.cat([counts[big], counts[~big].sum()[None]])
    expected = torch.cat([expected[big], expected[~big].sum()[None]])
    used = expected > 1e-9
    statistic = ((counts - expected).square() / expected)[used].sum()
    return float(statistic), int(used.sum()) - 1


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.8)])
def test_first_and_second_tokens_follow_the_exact_probabilities(engine, model, temperature, top_p) -> None:
    """Chi-square over 4,000 samples, against probabilities computed here in float64."""
    prompt = Prompt("freq", (6, 7, 8), "", "")
    params = SamplingParams(2, temperature=temperature, top_p=top_p, n=4000, seed=11)
    drawn = torch.tensor(tokens_of(engine.generate([prompt], params))[0])

    def nucleus(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = model.double()(torch.tensor([ids]), use_cache=False).logits[0, -1] / temperature
        model.float()
        probs, kept, mass = logits.softmax(-1), [], 0.0
        for token in probs.argsort(descending=True).tolist():
            if mass >= top_p:
                break
            kept.append(token)
            mass += float(probs[token])
        out = torch.zeros_like(probs)
        out[kept] = probs[kept] / probs[kept].sum()
        return out

    first = nucleus(list(prompt.token_ids))
    likeliest = int(first.argmax())
    second = nucleus([*prompt.token_ids, likeliest])
    for probs, tokens in ((first, drawn[:, 0]), (second, drawn[drawn[:, 0] == likeliest, 1])):
        counts = torch.bincount(tokens, minlength=VOCAB).double()
        assert len(tokens) > 300
        assert int(counts[probs == 0].sum()) == 0
        statistic, freedom = chi_square(counts, probs)
        # Wilson and Hilferty: the cube root of chi2/k is nearly normal; 3.3 sigma is p = 0.0005.
        limit = freedom * (1 - 2 / (9 * freedom) + 3.3 * (2 / (9 * freedom)) ** 0.5) ** 3
        assert freedom >= 3
        assert statistic < limit


def test_stop_tokens_end_a_row_and_belong_to_it(engine) -> None:
    stops = (EOS, 9)
    params = SamplingParams(30, n=6, seed=2, stop_token_ids=stops)
    free = SamplingParams(30, n=6, seed=2)
    prompts = make_prompts(8)
    reasons = set()
    for stopped, whole in zip(engine.generate(prompts, params), engine.generate(prompts, free), strict=True):
        for short, long in zip(stopped.samples, whole.samples, strict=True):
            ends = [t for t, token in enumerate(long.token_ids) if token in stops]
            length = ends[0] + 1 if ends else 30
            assert short.token_ids == long.token_ids[:length]
            assert short.finish_reason == ("stop" if ends else "length")
            # The text is without the token that stopped it, which is no special one.
            said = short.token_ids[: -1 if ends else None]
            assert short.text == "".join(LETTERS[i - 2] for i in said if i >= 2)
            assert (long.finish_reason, len(long.token_ids)) == ("length", 30)
            reasons.add(short.finish_reason)
    assert reasons == {"stop", "length"}
    assert any(s.token_ids[-1] == 9 for g in engine.generate(prompts, params) for s in g.samples)


def test_dropping_finished_rows_saves_work_and_changes_nothing(folder, model, monkeypatch) -> None:
    engine = make_engine(folder, model)
    params = SamplingParams(40, n=6, seed=2, stop_token_ids=(EOS, 9, 17))
    rows: list[int] = []
    engine._model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    compacted = engine.generate(make_prompts(8), params)
    work, widths = sum(rows), set(rows)
    rows.clear()
    monkeypatch.setattr("megatron_dgpo.rollout.embedded.COMPACT_SHARE", 0.0)
    plain = engine.generate(make_prompts(8), params)
    assert len(widths) > 2 and work < 0.75 * sum(rows)
    assert rows[0] == 8 and set(rows[1:]) == {48}, "each prompt once, then all samples"
    assert tokens_of(compacted) == tokens_of(plain)
    for a, b in zip(compacted, plain, strict=True):
        for x, y in zip(a.samples, b.samples, strict=True):
            gap = torch.tensor(x.log_probs) - torch.tensor(y.log_probs)
            assert float(gap.abs().max()) < 1e-5


def test_a_stop_token_in_the_last_place_counts_as_stop(engine) -> None:
    prompt = make_prompts(1)
    tokens = tokens_of(engine.generate(prompt, SamplingParams(6, seed=3)))[0][0]
    at = max(t for t in range(6) if tokens[t] not in tokens[:t])
    params = SamplingParams(at + 1, seed=3, stop_token_ids=(tokens[at],))
    sample = engine.generate(prompt, params)[0].samples[0]
    assert (sample.token_ids, sample.finish_reason) == (tokens[: at + 1], "stop")


def test_shared_weights_are_no_copies_and_are_not_used_between_updates(folder, model) -> None:
    """Half of the tensors are the owner's own; after a change of his the engine waits for the other half."""
    owned = {name: p.detach().clone() for name, p in model.named_parameters()}
    lent = {name: tensor for name, tensor in owned.items() if "proj" not in name}
    changes = [0]
    engine, prompts, params = make_engine(folder), make_prompts(4), SamplingParams(12, n=3, seed=9)
    engine.share(lent, lambda: changes[0])
    with pytest.raises(RuntimeError, match="update_weights first"):
        engine.generate(prompts, params)
    engine.update_weights(owned.items(), 1)
    held = {name: p.data_ptr() for name, p in engine._model.named_parameters()}
    assert {n for n in held if held[n] == owned[n].data_ptr()} == set(lent) and 0 < len(lent) < len(held)
    want = make_engine(folder, model).generate(prompts, params)
    assert tokens_of(engine.generate(prompts, params)) == tokens_of(want)

    for tensor in owned.values():
        tensor.mul_(1.25)
    changes[0] += 1
    for call in (lambda: engine.generate(prompts, params), lambda: engine.log_probs([[2, 3]])):
        with pytest.raises(RuntimeError, match="the policy has changed since weight version 1"):
            call()
    engine.update_weights(owned.items(), 2)
    plain = make_engine(folder)
    plain.update_weights(owned.items(), 2)
    assert tokens_of(engine.generate(prompts, params)) == tokens_of(plain.generate(prompts, params))
    assert tokens_of(engine.generate(prompts, params)) != tokens_of(want)
    name = next(iter(lent))
    others = {**owned, name: owned[name] + 1}
    with pytest.raises(ValueError, match=f"{name}.* is shared with the policy"):
        engine.update_weights(others.items(), 3)


def test_text_order_and_index(engine) -> None:
    prompts = make_prompts(5)
    groups = engine.generate(prompts, SamplingParams(12, n=3, seed=9, stop_token_ids=(EOS,)))
    assert [g.prompt for g in groups] == prompts
    for group in groups:
        assert [s.index for s in group.samples] == [0, 1, 2]
        for sample in group.samples:
            assert sample.prompt is group.prompt
            assert sample.text == "".join(LETTERS[i - 2] for i in sample.token_ids if i >= 2)
    assert engine.generate([], SamplingParams(4)) == []


def test_groups_are_handed_out_when_they_are_complete(folder, model) -> None:
    prompts, params = make_prompts(6), SamplingParams(8, n=3, seed=2)
    engine, come, done = make_engine(folder, model, max_batch_size=4), [], []
    groups = engine.generate(prompts, params, on_group=come.append, on_progress=done.append)
    assert sum(done) == 18 and sorted(map(id, come)) == sorted(map(id, groups))
    assert all(len(g.samples) == 3 and all(s.text for s in g.samples) for g in come)
    # Those that have ended are counted while the others of their batch go on.
    one, counts = make_engine(folder, model, max_batch_size=32), []
    params_of_one = SamplingParams(12, n=16, seed=9, stop_token_ids=(EOS,))
    one.generate(prompts[:2], params_of_one, on_progress=counts.append)
    assert sum(counts) == 32 and len([count for count in counts if count]) >= 2
    # 4 samples a batch: asked before each of five batches, the third answer stops it.
    answers = iter([False, False, True])
    stopped = engine.generate(prompts, params, should_stop=lambda: next(answers))
    kept = [g for g in stopped if g is not None]
    assert len(kept) == 2  # 8 samples are drawn, two whole groups among them
    whole = {g.prompt.id: g for g in groups}
    assert tokens_of(kept) == tokens_of([whole[g.prompt.id] for g in kept])


def test_new_weights_change_samples_and_version(folder, model) -> None:
    engine = make_engine(folder, model, version=3)
    prompts, params = make_prompts(4), SamplingParams(10, seed=1)
    before = engine.generate(prompts, params)
    other = random_model(folder, seed=2)
    engine.update_weights(((n, p.clone()) for n, p in other.named_parameters()), 4)
    after = engine.generate(prompts, params)
    assert {s.weight_version for g in before for s in g.samples} == {3}
    assert {s.weight_version for g in after for s in g.samples} == {engine.weight_version} == {4}
    assert tokens_of(before) != tokens_of(after)
    assert tokens_of(after) == tokens_of(make_engine(folder, other).generate(prompts, params))


def test_missing_unknown_and_repeated_names_raise(folder, model) -> None:
    engine = make_engine(folder, model)
    weights = dict(model.named_parameters())
    fewer = {n: w for n, w in weights.items() if n not in ("model.norm.weight", "lm_head.weight")}
    with pytest.raises(KeyError, match=r"missing \['model.norm.weight', 'lm_head.weight'\]"):
        engine.update_weights(fewer.items(), 2)
    assert engine.weight_version == -1
    with pytest.raises(RuntimeError, match="no complete weights"):
        engine.generate(make_prompts(1), SamplingParams(2))
    with pytest.raises(KeyError, match="unknown or repeated .'model.extra'"):
        engine.update_weights([*weights.items(), ("model.extra", torch.zeros(1))], 2)
    with pytest.raises(KeyError, match="unknown or repeated .'model.norm.weight'"):
        engine.update_weights([*weights.items(), ("model.norm.weight", weights["model.norm.weight"])], 2)
    engine.update_weights(weights.items(), 2)
    assert engine.weight_version == 2


def test_wrong_shapes_and_old_versions_raise(folder, model) -> None:
    engine = make_engine(folder, model, version=5)
    with pytest.raises(ValueError, match="version 4 is older than the engine's 5"):
        engine.update_weights(model.named_parameters(), 4)
    assert engine.weight_version == 5
    wrong = ((n, p.T if n == "lm_head.weight" else p) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match=r"'lm_head.weight' has shape \(32, 38\), .* expects \(38, 32\)"):
        engine.update_weights(wrong, 6)


def test_tied_head_needs_no_delivery_and_must_agree(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, tied=True, family=LlamaConfig)
    model = random_model(folder, seed=4)
    names = dict(model.named_parameters())
    assert "lm_head.weight" not in names
    engine = make_engine(folder, model)
    prompts = make_prompts(3)
    for group in engine.generate(prompts, SamplingParams(8, seed=1)):
        expected = full_forward_log_probs(model, group.prompt, group.samples[0].token_ids, 1.0)
        got = torch.tensor(group.samples[0].log_probs).double()
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    engine.update_weights(model.state_dict().items(), 2)  # names both
    other = [*names.items(), ("lm_head.weight", torch.zeros(VOCAB, 32))]
    with pytest.raises(ValueError, match="tied by the config but differ"):
        engine.update_weights(other, 3)


def test_non_finite_logits_name_the_prompt(folder, model) -> None:
    engine = make_engine(folder, model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    weights["model.embed_tokens.weight"][7] = torch.nan
    engine.update_weights(weights.items(), 2)
    prompts = [Prompt("good", (3, 4), "", ""), Prompt("bad", (3, 7), "", "")]
    with pytest.raises(RuntimeError, match=r"non-finite logits at response token 0 of prompt\(s\) bad with"):
        engine.generate(prompts, SamplingParams(1))


def test_bad_prompts_are_refused_by_id(engine) -> None:
    cases = [
        ((), "prompt 'p' has no tokens"),
        ((3, VOCAB), f"prompt 'p' has token id {VOCAB}, outside the vocabulary of {VOCAB}"),
        ((3, -1), "prompt 'p' has token id -1"),
        (tuple([3] * 120), "prompt 'p': 120 tokens and max_new_tokens 9 exceed the model's 128 positions"),
    ]
    for ids, message in cases:
        with pytest.raises(ValueError, match=message):
            engine.generate([Prompt("p", ids, "", "")], SamplingParams(9))
    with pytest.raises(ValueError, match="'p' occurs twice"):
        engine.generate([Prompt("p", (3,), "", ""), Prompt("p", (4,), "", "")], SamplingParams(2))
    with pytest.raises(ValueError, match="sequence 1 has no tokens"):
        engine.log_probs([[3], []])


def test_no_weights_and_closed_are_refused(folder, model) -> None:
    engine = make_engine(folder)
    with pytest.raises(RuntimeError, match="no complete weights"):
        engine.generate(make_prompts(1), SamplingParams(2))
    engine.update_weights(model.named_parameters(), 0)
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.log_probs([[3, 4]])
    with pytest.raises(ValueError, match="max_batch_size must be at least 1, not 0"):
        make_engine(folder, max_batch_size=0)
