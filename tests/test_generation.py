# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What generates: the same tokens as plain forward passes give, whoever shares the batch and whatever came before."""

import functools
import inspect

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BloomConfig,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from trl_agents.rollout.generation import BatchBackend, Reply, Sampling, SlotBackend, replay


VOCAB = 96
EOS = 95
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 640,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
GPT2_SHAPE = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": EOS}
CONFIGS = {
    "qwen3": lambda: Qwen3Config(**SHAPE),
    "gpt2": lambda: GPT2Config(**GPT2_SHAPE, n_positions=640),
    # Sliding windows much shorter than the prompts below, in every other layer and in all
    "gemma2": lambda: Gemma2Config(**SHAPE, sliding_window=6, query_pre_attn_scalar=8, attn_implementation="eager"),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=6),
    # Llama has no windows: what a converted checkpoint may say of one must not count
    "llama": lambda: LlamaConfig(**SHAPE, sliding_window=6),
    "gpt2-eager": lambda: GPT2Config(**GPT2_SHAPE, n_positions=640, attn_implementation="eager"),
}
every_family = pytest.mark.parametrize("family", CONFIGS)


def model_from(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # larger than a fresh model's, so that what is read makes a difference
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@functools.cache
def model_of(family):
    return model_from(CONFIGS[family]())


def tokens(seed, length):
    return np.random.default_rng(seed).integers(2, EOS, length).tolist()


@torch.no_grad()
def reference(model, prompt, budget, eos=(EOS,)):
    """Greedy decoding, one full forward pass a token."""
    ids = list(prompt)
    for _ in range(budget):
        ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        if ids[-1] in eos:
            break
    return tuple(ids[len(prompt) :])


def greedy(model, n_slots, eos=(EOS,)):
    return SlotBackend(model, n_slots, Sampling(eos, temperature=0.0))


def answers(backend, prompts, budget=6, rng=None):
    """Submits `{slot: prompt}` and steps until all replies are there."""
    for slot, prompt in prompts.items():
        backend.submit(slot, prompt, budget, rng)
    replies = {}
    while backend.busy:
        replies.update(backend.step())
    return replies


def check_greedy(backend, model, prompts, budget=6):
    replies = answers(backend, prompts, budget)
    assert {slot: reply.ids for slot, reply in replies.items()} == {
        slot: reference(model, prompt, budget) for slot, prompt in prompts.items()
    }
    return replies


def forward_calls(model):
    """A list that fills with the shape of the input of each forward pass."""
    calls = []

    def note(module, args, kwargs):
        calls.append(tuple(kwargs["input_ids"].shape))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return calls


class TestSlotBackendAgreesWithPlainForwardPasses:
    @every_family
    def test_turns_that_append(self, family):
        model = model_of(family)
        backend = greedy(model, 3)
        prompts = {slot: tokens(slot, length) for slot, length in enumerate((5, 17, 9))}
        for turn in range(4):
            replies = check_greedy(backend, model, prompts)
            for slot, reply in replies.items():
                prompts[slot] = [*prompts[slot], *reply.ids, *tokens(10 * turn + slot, 1 + 4 * slot)]

    @every_family
    def test_prompts_that_change_in_the_middle(self, family):
        model = model_of(family)
        backend = greedy(model, 3)
        head, tail = tokens(0, 12), tokens(1, 3)
        for turn in range(3):
            middles = {slot: tokens((turn, slot), 2 + 3 * slot) for slot in range(3)}
            check_greedy(backend, model, {slot: [*head, *middle, *tail] for slot, middle in middles.items()})

    @every_family
    def test_a_shared_prompt_is_copied(self, family):
        model = model_of(family)
        backend = greedy(model, 5)
        one, other = tokens(0, 14), tokens(1, 9)
        prompts = {0: one, 1: other, 2: one, 3: other, 4: tokens(2, 14)}
        replies = check_greedy(backend, model, prompts)
        # The copies are of their own from then on
        check_greedy(
            backend,
            model,
            {slot: [*prompt, *replies[slot].ids, *tokens((9, slot), 3)] for slot, prompt in prompts.items()},
        )

    @every_family
    def test_a_slot_is_used_again(self, family):
        model = model_of(family)
        backend = greedy(model, 2)
        longest = tokens(0, 20)
        # Another prompt, shorter, longer, a part of what is held, the same again, one token
        for prompt in (longest, tokens(1, 4), tokens(2, 30), tokens(2, 11), tokens(2, 11), [7], longest):
            check_greedy(backend, model, {0: prompt, 1: tokens(3, 8)}, budget=4)

    @every_family
    def test_idle_rows_ride_along(self, family):
        model = model_of(family)
        backend = greedy(model, 4)
        prompts = {slot: tokens(slot, 6 + 5 * slot) for slot in range(4)}
        budgets, replies = {0: 3, 1: 12, 2: 1, 3: 9}, {}
        for slot, prompt in prompts.items():
            backend.submit(slot, prompt, budgets[slot], None)
        asked_again = False
        while backend.busy:
            replies.update(backend.step())
            if not asked_again and {0, 2} <= set(replies):
                # Slot 2 is asked its next question while 1 and 3 are in the middle of their replies, and 0 stays idle
                asked_again = True
                first = replies.pop(2).ids
                assert first == reference(model, prompts[2], 1)
                prompts[2] = [*prompts[2], *first, *tokens(8, 5)]
                budgets[2] = 4
                backend.submit(2, prompts[2], 4, None)
        assert asked_again
        for slot, prompt in prompts.items():
            assert replies[slot].ids == reference(model, prompt, budgets[slot])
        # What rode along left no trace
        prompts = {slot: [*prompt, *replies[slot].ids, *tokens(slot, 2)] for slot, prompt in prompts.items()}
        check_greedy(backend, model, prompts)

    def test_few_busy_slots_of_many(self):
        model = model_of("qwen3")
        backend = greedy(model, 8)
        check_greedy(backend, model, {7: tokens(0, 5)})
        check_greedy(backend, model, {slot: tokens(slot, 3 + slot) for slot in range(8)})
        check_greedy(backend, model, {6: tokens(1, 4), 2: tokens(2, 6)})

    @pytest.mark.parametrize("family", ["qwen3", "gpt2"])
    def test_growth_past_the_capacity(self, family):
        model = model_of(family)
        backend = greedy(model, 2)
        prompts = {0: tokens(0, 253), 1: tokens(1, 8)}
        for length in (1, 40, 270):  # past 256 while decoding, while reading, by two steps of growth
            replies = check_greedy(backend, model, prompts, budget=5)
            prompts = {
                slot: [*prompt, *replies[slot].ids, *tokens((length, slot), length if slot == 0 else 2)]
                for slot, prompt in prompts.items()
            }
        check_greedy(backend, model, prompts, budget=5)

    def test_at_the_last_position(self):
        model = model_from(GPT2Config(**GPT2_SHAPE, n_positions=32))
        backend = greedy(model, 2)
        replies = check_greedy(backend, model, {0: tokens(0, 26), 1: tokens(1, 3)}, budget=2)
        # Slot 0 reads one token and slot 1 twenty: side by side, the padding of slot 0 would stand at position 47
        prompts = {0: [*tokens(0, 26), *replies[0].ids, 5, 6], 1: [*tokens(1, 3), *replies[1].ids, *tokens(2, 20)]}
        check_greedy(backend, model, prompts, budget=3)

    @pytest.mark.parametrize("window", [None, 600], ids=["packed", "blocks"])
    def test_positions_that_stretch(self, window):
        """Beyond so many tokens longrope turns all keys of a pass otherwise, for the sake of its longest row."""
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        limits = {"original_max_position_embeddings": 32, "sliding_window": window}
        model = model_from(Phi3Config(**SHAPE, **limits, rope_parameters=rope))
        backend = greedy(model, 4)
        check_greedy(backend, model, {0: tokens(0, 40), 1: tokens(1, 12), 2: tokens(2, 30), 3: tokens(2, 30)}, 9)
        # One that was short reads its past again, one that was long too; the others have been read already
        held = [list(slot.ids) for slot in backend.slots]
        prompts = {0: held[0] + tokens(3, 5), 1: held[1] + tokens(4, 15), 2: held[2][:9], 3: held[3] + tokens(5, 2)}
        check_greedy(backend, model, prompts)
        check_greedy(backend, model, {2: tokens(6, 33), 3: tokens(6, 33), 0: tokens(7, 33)}, 3)

    @pytest.mark.filterwarnings("error::FutureWarning")
    def test_nothing_that_transformers_takes_back(self):
        """Arguments that it will drop are warned of for some releases, and then lost without a word."""
        model = model_from(CONFIGS["qwen3"]())
        check_greedy(greedy(model, 2), model, {0: tokens(1, 9), 1: tokens(2, 4)})

    def test_with_lora(self):
        model = get_peft_model(model_from(CONFIGS["qwen3"](), seed=1), LoraConfig(target_modules=["q_proj", "v_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        backend = greedy(model.eval(), 2)
        prompts = {0: tokens(0, 7), 1: tokens(1, 12)}
        replies = check_greedy(backend, model, prompts)
        with model.disable_adapter():
            assert {slot: reply.ids for slot, reply in replies.items()} != {
                slot: reference(model, prompt, 6) for slot, prompt in prompts.items()
            }


class TestForwardPasses:
    """Of a model that packs tokens, and of one (with sliding windows) that pads rows to a block."""

    @pytest.mark.parametrize(("family", "step"), [("qwen3", (1, 4)), ("mistral", (4, 1))])
    def test_a_group_reads_its_prompt_once(self, family, step):
        model = model_from(CONFIGS[family]())
        backend = greedy(model, 4)
        calls = forward_calls(model)
        answers(backend, dict.fromkeys(range(4), tokens(0, 20)), budget=3)
        assert calls == [(1, 19), step, step, step]

    @pytest.mark.parametrize(("family", "expected"), [("qwen3", [(1, 12), (1, 2)]), ("mistral", [(2, 6), (2, 1)])])
    def test_a_turn_reads_what_is_new(self, family, expected):
        model = model_from(CONFIGS[family]())
        backend = greedy(model, 2)
        prompts = {0: tokens(0, 20), 1: tokens(1, 30)}
        replies = answers(backend, prompts, budget=2)
        calls = forward_calls(model)
        answers(backend, {slot: [*prompts[slot], *replies[slot].ids, *tokens(slot, 5)] for slot in prompts}, budget=2)
        # The last token of the reply was sampled but not read: it and 5 new ones, the last of them to sample from
        assert calls == expected

    def test_a_window_reads_from_the_change_on(self):
        model = model_from(CONFIGS["qwen3"]())
        backend = greedy(model, 1)
        answers(backend, {0: tokens(0, 50)}, budget=2)
        calls = forward_calls(model)
        answers(backend, {0: [*tokens(0, 50)[:40], *tokens(1, 8)]}, budget=1)
        assert calls == [(1, 8)]

    @pytest.mark.parametrize(
        ("family", "length", "expected"),
        [
            ("qwen3", 23, [(1, 26)]),
            # Three rows of padding to the new slot's length: up to 64 tokens are worth a pass
            ("mistral", 22, [(4, 22)]),
            ("mistral", 23, [(1, 22), (4, 1)]),
        ],
    )
    def test_a_long_read_beside_short_ones(self, family, length, expected):
        model = model_from(CONFIGS[family]())
        backend = greedy(model, 4, eos=())
        prompts = {slot: tokens(slot, 5) for slot in range(3)} | {3: tokens(3, length)}
        for slot in range(3):
            backend.submit(slot, prompts[slot], 6, None)
        assert backend.step() == []
        calls = forward_calls(model)
        backend.submit(3, prompts[3], 6, None)
        replies = dict(backend.step())
        assert calls == expected
        while backend.busy:
            replies.update(backend.step())
        assert {slot: reply.ids for slot, reply in replies.items()} == {
            slot: reference(model, prompt, 6, eos=()) for slot, prompt in prompts.items()
        }

    def test_nothing_to_do(self):
        backend = greedy(model_of("qwen3"), 2)
        assert backend.step() == [] and not backend.busy
        backend.drain()


class TestReplies:
    def test_the_end_of_turn_token_is_part_of_the_reply(self):
        model = model_of("qwen3")
        prompt = tokens(0, 9)
        free = reference(model, prompt, 8, eos=())
        end = free.index(free[4])  # a token may come twice
        backend = greedy(model, 1, eos=(EOS, free[4]))
        reply = answers(backend, {0: prompt}, budget=8)[0]
        assert reply == Reply(free[: end + 1], cut_off=False)
        # Not cut off when it comes as the last token of the budget, cut off one token before
        assert answers(backend, {0: prompt}, budget=end + 1)[0] == reply
        if end:
            assert answers(backend, {0: prompt}, budget=end)[0] == Reply(free[:end], cut_off=True)

    def test_a_reply_may_be_over_at_any_token(self):
        model = model_of("qwen3")
        prompts = {0: tokens(0, 9), 1: tokens(1, 5)}
        backend, seen, replies = greedy(model, 2, eos=()), [], {}
        backend.submit(0, prompts[0], 8, None, is_over=lambda ids: seen.append(list(ids)) or len(ids) == 3)
        backend.submit(1, prompts[1], 8, None)
        while backend.busy:
            replies.update(backend.step())
        whole = [reference(model, prompts[slot], 8, eos=()) for slot in (0, 1)]
        assert seen == [list(whole[0][:n]) for n in (1, 2, 3)]
        assert replies == {0: Reply(whole[0][:3], cut_off=False), 1: Reply(whole[1], cut_off=True)}
        # The next reply in the slot is whole again
        assert answers(backend, {0: prompts[0]}, budget=8)[0] == Reply(whole[0], cut_off=True)

    def test_a_budget_is_kept(self):
        backend = greedy(model_of("qwen3"), 2, eos=())
        for slot, budget in enumerate((1, 4)):
            backend.submit(slot, tokens(slot, 6), budget, None)
        replies = dict(backend.step())
        assert list(replies) == [0] and backend.busy
        for _ in range(3):
            assert list(replies) == [0]
            replies.update(backend.step())
        assert not backend.busy
        assert [(len(replies[slot].ids), replies[slot].cut_off) for slot in (0, 1)] == [(1, True), (4, True)]

    def test_misuse(self):
        backend = greedy(model_of("qwen3"), 1)
        with pytest.raises(ValueError, match="prompt is empty"):
            backend.submit(0, [], 4, None)
        backend.submit(0, [5, 6], 4, None)
        with pytest.raises(ValueError, match="slot 0 is still busy"):
            backend.submit(0, [5, 6], 4, None)

    @pytest.mark.parametrize("temperature", [1.0, 0.0])
    def test_diverged_weights_are_no_text(self, temperature):
        model = model_from(CONFIGS["qwen3"]())
        backend = SlotBackend(model, 1, Sampling((EOS,), temperature))
        model.lm_head.weight.data.fill_(torch.nan)
        backend.submit(0, [5, 6], 4, np.random.default_rng(0))
        with pytest.raises(FloatingPointError, match="diverged"):
            backend.step()


class TestLuck:
    def test_it_depends_neither_on_company_nor_on_slots(self):
        model = model_of("qwen3")
        prompts = [tokens(number, 4 + 3 * number) for number in range(5)]

        def play(n_slots, order):
            backend = SlotBackend(model, n_slots, Sampling((EOS,), temperature=1.3, top_p=0.9))
            rngs = {number: np.random.default_rng([0, number]) for number in order}
            queue, sampled, where = list(order), {}, {}
            history = {number: list(prompts[number]) for number in order}
            turns = dict.fromkeys(order, 0)

            def ask(slot, number):
                where[slot] = number
                backend.submit(slot, history[number], 7, rngs[number])

            for slot in range(min(n_slots, len(queue))):
                ask(slot, queue.pop(0))
            while backend.busy:
                for slot, reply in backend.step():
                    number = where[slot]
                    sampled.setdefault(number, []).append(reply.ids)
                    history[number] += [*reply.ids, *tokens((number, turns[number]), 3)]
                    turns[number] += 1
                    if turns[number] < 2:
                        ask(slot, number)
                    elif queue:
                        ask(slot, queue.pop(0))
            return sampled

        together = play(5, range(5))
        assert len({ids for turns in together.values() for ids in turns}) > 5  # there is luck
        for number in range(5):
            assert play(1, [number])[number] == together[number]
        assert play(2, [4, 2, 0, 1, 3]) == together
        assert play(8, range(5)) == together

    @pytest.mark.parametrize(
        "how",
        [
            {},
            {"temperature": 0.6},
            {"temperature": 1.7, "top_k": 7},
            {"top_p": 0.8},
            {"min_p": 0.05},
            {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        ],
        ids=str,
    )
    def test_the_distribution_is_the_one_asked_for(self, how):
        model, prompt, width, rounds = model_of("gpt2"), tokens(3, 6), 256, 24
        backend = SlotBackend(model, width, Sampling((EOS,), **how))
        rngs = [np.random.default_rng(number) for number in range(width)]
        counts = np.zeros(VOCAB)
        for _ in range(rounds):
            for slot in range(width):
                backend.submit(slot, prompt, 1, rngs[slot])
            for _, reply in backend.step():
                counts[reply.ids[0]] += 1
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().numpy()
        expected = by_hand(logits, **how) * width * rounds
        assert counts[expected == 0].sum() == 0
        often = expected >= 5
        assert often.sum() >= 4
        expected_bins = [*expected[often], max(expected[~often].sum(), 1e-9)]
        counted_bins = [*counts[often], counts[~often].sum()]
        chi_square = sum((n - m) ** 2 / max(m, 1.0) for n, m in zip(counted_bins, expected_bins, strict=True))
        degrees = len(expected_bins) - 1
        assert chi_square < degrees + 4 * (2 * degrees) ** 0.5

    def test_no_token_of_no_probability(self):
        class Edges:
            """The smallest and the largest number that a generator gives."""

            def __init__(self, value):
                self.value = value

            def random(self):
                return self.value

        model = model_of("qwen3")
        prompt = tokens(0, 5)
        with torch.no_grad():
            best = model(input_ids=torch.tensor([prompt])).logits[0, -1].topk(3).indices.tolist()
        backend = SlotBackend(model, 2, Sampling((), top_k=3))
        for slot, value in enumerate((0.0, 1 - 2**-53)):
            backend.submit(slot, prompt, 1, Edges(value))
        assert [reply.ids[0] for _, reply in backend.step()] == [min(best), max(best)]


def by_hand(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=None):
    """Softmax, and each truncation of what the one before left."""

    def softmax(values):
        values = np.exp(values - values.max())
        return values / values.sum()

    probs = softmax(logits / temperature)
    if top_k:
        probs[np.argsort(-probs)[top_k:]] = 0
        probs /= probs.sum()
    if top_p < 1:
        order = np.argsort(-probs)
        before = np.cumsum(probs[order]) - probs[order]  # the smallest set that holds at least top_p
        probs[order[before >= top_p]] = 0
        probs /= probs.sum()
    if min_p is not None:
        probs[probs < min_p * probs.max()] = 0
        probs /= probs.sum()
    return probs


GPT_NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}


class TestUnsupportedModels:
    @pytest.mark.parametrize(
        ("config", "why"),
        [
            (MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2), "linear_attention|stateful"),
            # Its local layers mask by the length of the cache, wrong for rows of different lengths, and silently so
            (GPTNeoConfig(vocab_size=VOCAB, **GPT_NEO, window_size=8), "local attention"),
            (BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4), "usual form"),  # ALiBi
        ],
        ids=["mamba", "gpt-neo", "bloom"],
    )
    def test_architectures(self, config, why):
        with pytest.raises(ValueError, match=f"cannot decode with .*({why}).*Use `replay` instead"):
            greedy(model_from(config), 2)

    def test_attention_without_masks_per_row(self):
        model = model_from(CONFIGS["qwen3"]())
        model.config._attn_implementation = "flash_attention_2"
        assert "flash_attention_2" in SlotBackend.unsupported(model)

    def test_a_model_that_reads_positions_its_own_way(self):
        """Nothing in its configuration shows it, so its logits are compared."""
        model = model_from(CONFIGS["gpt2"]())

        def count_columns(module, args, kwargs):
            end = kwargs["cache"].get_seq_length() if kwargs.get("cache") else 0
            kwargs["position_ids"] = torch.arange(end, end + kwargs["input_ids"].shape[1])[None]
            return args, kwargs

        model.register_forward_pre_hook(count_columns, with_kwargs=True)
        assert "logits are off" in SlotBackend.unsupported(model)

    def test_the_check_is_made_once_and_leaves_no_trace(self):
        model = model_from(CONFIGS["gpt2"]()).train()
        calls = forward_calls(model)
        assert SlotBackend.unsupported(model) is None  # dropout, too, must not look like a fault
        assert model.training and calls
        n_calls = len(calls)
        assert SlotBackend.unsupported(model) is None and len(calls) == n_calls

    def test_half_precision_is_supported(self):
        assert SlotBackend.unsupported(model_from(CONFIGS["qwen3"]()).bfloat16()) is None


class TestReplay:
    @pytest.mark.parametrize("family", ["qwen3", "gemma2"])
    def test_agrees_with_slots(self, family):
        model = model_of(family)
        sampling = Sampling((EOS,), temperature=0.0)
        backends = [SlotBackend(model, 3, sampling), replay(model, sampling, pad_token_id=0)]
        prompts = {slot: tokens(slot, 4 + 5 * slot) for slot in range(3)}
        for turn in range(2):
            one, other = (answers(backend, prompts) for backend in backends)
            assert one == other
            prompts = {slot: [*prompts[slot], *one[slot].ids, *tokens(turn, 3)] for slot in prompts}

    def test_each_row_ends_at_its_own_budget(self):
        """A row with little room left must not run past the model's positions because another has more."""
        model = model_from(GPTNeoConfig(vocab_size=VOCAB, **GPT_NEO, window_size=8, max_position_embeddings=32))
        backend = replay(model, Sampling((), temperature=0.0), pad_token_id=0)
        prompts = {0: tokens(0, 30), 1: tokens(1, 4), 2: tokens(2, 9)}
        for slot, budget in ((0, 2), (1, 12), (2, 12)):
            backend.submit(slot, prompts[slot], budget, None)
        replies = dict(backend.step())
        for slot, budget in ((0, 2), (1, 12), (2, 12)):
            assert replies[slot] == Reply(reference(model, prompts[slot], budget, eos=()), cut_off=True)

    @pytest.mark.parametrize("wrap", [lambda model: model, lambda model: get_peft_model(model, LoraConfig())])
    def test_the_models_own_generation_config_does_not_count(self, wrap):
        inner = model_from(CONFIGS["qwen3"]())
        prompt = tokens(0, 6)
        expected = reference(inner, prompt, 12)
        own = GenerationConfig(repetition_penalty=5.0, suppress_tokens=list(set(expected)), eos_token_id=EOS)
        inner.generation_config = own
        backend = replay(wrap(inner).eval(), Sampling((EOS,), temperature=0.0), pad_token_id=0)
        assert answers(backend, {0: prompt}, budget=12)[0].ids == expected
        assert inner.generation_config is own
        with pytest.raises(IndexError):
            answers(backend, {0: [VOCAB]})
        assert inner.generation_config is own

    def test_samples(self):
        backend = replay(model_of("qwen3"), Sampling((EOS,), temperature=1.5, top_k=3), pad_token_id=0)
        torch.manual_seed(0)
        replies = [answers(backend, {0: tokens(0, 5)})[0].ids for _ in range(5)]
        assert len(set(replies)) > 1


class TestBatchBackend:
    @staticmethod
    def echo(calls):
        def generate(prompts, budgets):
            calls.append((prompts, budgets))
            return [Reply((prompt[0],), cut_off=False, logprobs=(-1.0,)) for prompt in prompts]

        return generate

    def test_one_call_answers_all(self):
        calls = []
        backend = BatchBackend(self.echo(calls))
        prompt = [3, 4]
        backend.submit(2, prompt, 9, None)
        prompt.append(5)  # what was submitted stands
        backend.submit(0, [7], 8, None)
        assert backend.busy
        assert backend.step() == [(2, Reply((3,), False, (-1.0,))), (0, Reply((7,), False, (-1.0,)))]
        assert calls == [([[3, 4], [7]], [9, 8])]
        assert not backend.busy and backend.step() == []
        backend.drain()
        assert len(calls) == 1

    def test_misuse(self):
        backend = BatchBackend(lambda prompts, budgets: [])
        backend.submit(0, [3], 9, None)
        with pytest.raises(ValueError, match="slot 0 is still busy"):
            backend.submit(0, [3], 9, None)
        backend.submit(1, [3], 9, None)
        with pytest.raises(RuntimeError, match="answered 0 of 2 prompts"):
            backend.step()

    def test_processes_make_the_same_number_of_calls(self):
        """One process has 2 rounds of prompts, another 4: both must call 4 times, the drained one with nothing."""
        others = [True, True, True, True, False]  # whether the other process has prompts at each question
        calls, asked = [], []

        def keep_in_step(has_prompts):
            asked.append(has_prompts)
            return has_prompts or others[len(asked) - 1]

        backend = BatchBackend(self.echo(calls), keep_in_step)
        for _ in range(2):
            backend.submit(0, [3], 9, None)
            backend.step()
        backend.drain()
        assert asked == [True, True, False, False, False]
        assert [len(prompts) for prompts, _ in calls] == [1, 1, 0, 0]

    def test_no_question_without_prompts(self):
        """While its environments work a process has nothing to generate: it must not join the others' calls."""
        asked = []
        backend = BatchBackend(self.echo([]), lambda has_prompts: asked.append(has_prompts) or has_prompts)
        assert backend.step() == []
        assert asked == []


@pytest.mark.parametrize(
    "make", [lambda: greedy(model_of("qwen3"), 2), lambda: BatchBackend(None)], ids=["slot", "batch"]
)
def test_the_interface(make):
    backend = make()
    assert list(inspect.signature(backend.submit).parameters)[:4] == ["slot", "prompt_ids", "max_new_tokens", "rng"]
    assert backend.busy is False
    assert backend.step() == []
    assert backend.drain() is None
